"""The messages about settings and arrays, before anything is compiled."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt
from lbopt.collectives import Axis
from lbopt.curvature.eigen_moments import CorrectedStatistics
from lbopt.transforms import validation
from lbopt.transforms.eigen_moments import Moments
from tests.problems import Mlp, assert_equal, classify

ADAPTIVE = {"factor_decay": 0.0, "stale_threshold": 0.1}


@pytest.fixture(scope="module")
def layers():
    return classify(Mlp()).trace()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping": -1e-3}, r"damping=-0.001 must be positive; 1e-3 is a usual start"),
        ({"damping": 0.0}, "damping=0.0 must be positive"),
        ({"damping": float("nan")}, "damping=nan must be positive"),
        ({"norm_damping": 0}, "norm_damping=0 must be positive; 1 damps them like"),
        ({"factor_decay": 1.0}, r"factor_decay=1.0 must lie in \[0, 1\); 0 keeps"),
        ({"factor_decay": -0.1}, r"factor_decay=-0.1 must lie in \[0, 1\)"),
        ({"periods": 5}, r"periods=5 must be an lbopt.Periods; write lbopt.Per"),
        (
            {"placement": "comm"},
            r"placement='comm' must be an lbopt.Placement; write",
        ),
        ({"block_size": 0}, "block_size=0 must be a whole number, ≥ 1; None keeps"),
        ({"block_size": 2.5}, "block_size=2.5 must be a whole number, ≥ 1"),
        ({"block_size": jnp.asarray(3)}, "block_size=3 must be a Python int, becau"),
        (ADAPTIVE | {"stale_threshold": -1}, "stale_threshold=-1 must be 0 or positi"),
        ({"stale_threshold": 0.1}, "factor_decay=0.95 must be 0 with stale_threshold="),
        (
            ADAPTIVE | {"periods": lbopt.Periods(statistics=2)},
            "periods.statistics=2 must be 1 with stale_threshold=0.1, which compares",
        ),
        (
            ADAPTIVE | {"periods": lbopt.Periods(inverses=5)},
            "periods.inverses=5 must be 1 with .* pass stale_threshold=None",
        ),
        (
            ADAPTIVE | {"periods": lbopt.Periods(statistics=jnp.asarray(2))},
            "periods.statistics=2 must be 1",
        ),
        ({"eigenvalues": "exact"}, "eigenvalues='exact' must be 'kronecker' or 'corr"),
        (
            {
                "eigenvalues": "corrected",
                "placement": lbopt.Placement("data", 2, "memory"),
            },
            "placement.inverses='memory' must not be set with eigenvalues='corrected'",
        ),
        (
            {
                "eigenvalues": "corrected",
                "placement": lbopt.Placement("data", 2, 0.5),
            },
            "placement.inverses=0.5 must not be set .*: every device .* use 'comm'",
        ),
        (
            {"eigenvalues": "corrected", "periods": lbopt.Periods(inverses=None)},
            "periods.inverses=None must not be set .*: BackgroundInversion .* give a",
        ),
        (
            {"eigenvalues": "corrected"} | ADAPTIVE,
            "stale_threshold=0.1 must not be set .* leave it None",
        ),
    ],
)
def test_settings_out_of_range(layers, settings, message):
    # Before the types are checked, which would object in other words.
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(lbopt.scale_by_kfac)(layers, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        ADAPTIVE,
        {"factor_decay": 0, "stale_threshold": 0},
        {"factor_decay": np.float32(0.9), "damping": np.float64(1e-3)},
        {"damping": lambda count: 1e-3, "block_size": 1},
        {"placement": lbopt.Placement("data", 8), "norm_damping": 16},
        {"eigenvalues": "corrected", "placement": lbopt.Placement("data", 2)},
    ],
)
def test_settings_that_are_taken(layers, settings):
    lbopt.scale_by_kfac(layers, **settings)


def test_a_traced_period_passes_with_an_adaptive_refresh(layers):
    def count(period):
        lbopt.scale_by_kfac(layers, periods=lbopt.Periods(period, period), **ADAPTIVE)
        return period

    assert jax.jit(count)(1) == 1


def test_layers_of_another_kind(layers):
    make = inspect.unwrap(lbopt.scale_by_kfac)
    with pytest.raises(ValueError, match=r"layers=dict must be the result of lbopt"):
        make(dict(layers))
    with pytest.raises(ValueError, match=r"layers=\[\] must hold a layer that the los"):
        make(type(layers)({}))


# ---------------------------------------------------------------------- parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: {"first": p["first"]},
            "params has no 'last', which layers has; mak",
        ),
        (
            lambda p: p | {"first": {"kernel": jnp.ones((4, 9)), "bias": jnp.ones(9)}},
            r"params\['first'\]\['bias'\] has shape \[9\] where layers has \[5\]",
        ),
        (
            lambda p: p | {"first": p["first"] | {"bias": optax.MaskedNode()}},
            "layer 'first' is masked in part .* mask all of them or none",
        ),
        (
            lambda p: dict.fromkeys(p, optax.MaskedNode()),
            r"params holds none of the layers \['first', 'last'\], all are masked",
        ),
    ],
)
def test_parameters_that_do_not_fit(layers, change, message):
    params = change(classify(Mlp()).params)
    with pytest.raises(ValueError, match=message):
        lbopt.scale_by_kfac(layers).init(params)


@pytest.mark.parametrize(
    "mask",
    [
        {"first": True, "last": False},
        {"first": {"kernel": True, "bias": True}, "last": {"kernel": False}},
    ],
)
def test_a_mask_may_stop_at_a_module_or_name_every_array(layers, mask):
    tx = optax.masked(lbopt.scale_by_kfac(layers), mask)
    state = lbopt.curvature_state(tx.init(classify(Mlp()).params))
    assert set(state.factors) == {"first"}


# ----------------------------------------------------------------------- statistics


@pytest.fixture(scope="module")
def curvature(layers):
    return classify(Mlp()).evaluate(layers)[2]


def corrected(statistics, size=5):
    return CorrectedStatistics(statistics.a, statistics.g, jnp.ones((size, size)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: None, "update needs curvature=.*value_grad_and_curvature"),
        (
            lambda c: {"first": c["first"]},
            r"curvature has no 'last' \(it has \['first'\]\); make it with the same",
        ),
        (
            lambda c: c | {"last": tuple(c["last"])},
            r"curvature\['last'\] is a tuple, not a KroneckerFactors; make it",
        ),
        (
            lambda c: {"first": c["last"], "last": c["first"]},
            r"curvature\['first'\].g has shape \[3, 3\].*packed \[15\]",
        ),
        (
            lambda c: c | {"first": corrected(c["first"])},
            r"curvature\['first'\] is a CorrectedStatistics, not a KroneckerFactors",
        ),
    ],
)
def test_statistics_that_do_not_fit(layers, curvature, change, message):
    tx = lbopt.scale_by_kfac(layers)
    params = classify(Mlp()).params
    # While tracing: nothing is compiled before.
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda c: tx.update(params, tx.init(params), curvature=change(c)),
            curvature,
        )


@pytest.mark.parametrize("value", [1, (0.5, {}, {})])
def test_curvature_of_another_type(layers, value):
    kind = type(value).__name__
    message = f"curvature={kind} must be the statistics by path, the third result of"
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(validation.checked_statistics)(dict(layers), value, {})


def test_second_moments_that_do_not_fit(layers, curvature):
    moments = {"first": Moments(jnp.ones((5, 5)), jnp.asarray(0), jnp.asarray(True))}

    def checked(first):
        given = curvature | {"first": first}
        return validation.checked_statistics(dict(layers), given, moments)

    statistics, squares = checked(corrected(curvature["first"]))
    assert set(squares) == {"first"}
    assert_equal(statistics, dict(curvature))
    message = r"\['first'\] is a KroneckerFactors without the second moments that eigen"
    with pytest.raises(ValueError, match=message):
        checked(curvature["first"])
    message = r"curvature\['first'\].s has shape \[6, 6\], and the state's \[5, 5\]; e"
    with pytest.raises(ValueError, match=message):
        checked(corrected(curvature["first"], 6))


def test_shares_of_another_number_of_devices(layers):
    state = lbopt.scale_by_kfac(layers).init(classify(Mlp()).params)
    validation.check_shares(layers, state.factors, Axis(None, 1))
    message = r"axis_size=2 must be .* of 'first' has 15 numbers on a device, not 8; "
    with pytest.raises(ValueError, match=message):
        validation.check_shares(layers, state.factors, Axis("data", 2))


def test_shares_that_are_not_cut_over_the_devices(layers):
    tx = lbopt.scale_by_kfac(layers, placement=lbopt.Placement("data", 2))
    factors = tx.init(classify(Mlp()).params).factors
    mine = jax.tree.map(lambda x: x[:1], factors)  # what sharding.specs lets through
    validation.check_shares(layers, mine, Axis("data", 2))
    message = r"'first' arrives whole.*lbopt.sharding.specs\(opt_state, 'data'\)"
    with pytest.raises(ValueError, match=message):
        validation.check_shares(layers, factors, Axis("data", 2))
