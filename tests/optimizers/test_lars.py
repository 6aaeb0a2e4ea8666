"""LARS is the chain that its docstring writes out; its numbers are elsewhere."""

import optax
import pytest

import lbopt
from tests.optimizers.test_kfac import trajectory
from tests.problems import assert_close

BIASES = r"(^|/)(bias|scale)$"


@pytest.mark.parametrize(("variant", "skip"), [("paper", None), ("mlperf", BIASES)])
def test_lars_is_its_chain(gradients, variant, skip):
    tx = lbopt.lars(3.0, variant=variant, momentum=0.8)
    chain = optax.chain(
        lbopt.scale_by_lars(weight_decay=5e-4, trust_coefficient=1e-3, skip=skip),
        optax.scale_by_learning_rate(3.0),
        optax.trace(0.8),
    )
    assert_close(trajectory(gradients, tx), trajectory(gradients, chain))
