"""LARS is the chain that its docstring writes out; its numbers are elsewhere."""

import inspect

import optax
import pytest

import lbopt
from tests.optimizers.test_kfac import trajectory
from tests.problems import assert_close, assert_equal

BIASES = r"(^|/)(bias|scale)$"
RATE = optax.linear_schedule(3.0, 1.0, 2)


@pytest.mark.parametrize(
    ("settings", "skip", "clip"),
    [
        ({}, None, None),
        ({"variant": "paper"}, None, None),
        ({"variant": "mlperf"}, BIASES, None),
        ({"skip": "last"}, "last", None),
        ({"variant": "mlperf", "skip": "first"}, "first", None),
        ({"clip": True, "trust_coefficient": 10.0}, None, RATE),
        ({"nesterov": True, "weight_decay": 0.1}, None, None),
    ],
)
def test_lars_is_its_chain(gradients, settings, skip, clip):
    tx = lbopt.lars(RATE, momentum=0.8, **settings)
    chain = optax.chain(
        lbopt.scale_by_lars(
            weight_decay=settings.get("weight_decay", 5e-4),
            trust_coefficient=settings.get("trust_coefficient", 1e-3),
            least_rms=0.0 if "variant" in settings else 0.02,
            skip=skip,
            clip=clip,
        ),
        optax.scale_by_learning_rate(RATE),
        optax.trace(0.8, settings.get("nesterov", False)),
    )
    assert_close(trajectory(gradients, tx), trajectory(gradients, chain))


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("skip", [None, r"bias$"])
def test_the_variant_of_optax_is_optax_bit_for_bit(gradients, skip, nesterov):
    settings = {
        "weight_decay": 0.1,
        "trust_coefficient": 0.02,
        "momentum": 0.8,
        "nesterov": nesterov,
    }
    ours = lbopt.lars(RATE, variant="optax", skip=skip, **settings)
    mask = {"first": {"kernel": True, "bias": skip is None}, "last": {"kernel": True}}
    theirs = optax.with_extra_args_support(
        optax.lars(RATE, weight_decay_mask=mask, trust_ratio_mask=mask, **settings)
    )
    assert_equal(trajectory(gradients, ours), trajectory(gradients, theirs))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"variant": "larc"},
            r"variant='larc' must be 'floored', 'paper', 'mlperf' or",
        ),
        ({"momentum": 1.0}, r"momentum=1.0 must lie in \[0, 1\); 0 for none"),
        ({"learning_rate": -1.0}, r"learning_rate=-1.0 must be 0 or positive; it is"),
        ({"variant": "optax", "weight_decay": -1.0}, r"weight_decay=-1.0 must be 0"),
        (
            {"variant": "optax", "clip": True},
            r"clip=True must not be set with variant='optax', .* use variant='paper'",
        ),
    ],
)
def test_settings_out_of_range(change, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(lbopt.lars)(**({"learning_rate": 1.0} | change))
