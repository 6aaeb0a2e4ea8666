"""The measurement of an accelerator, carried out on a CPU."""

import json
import time

import jax
import numpy as np
import pytest

from benchmarks import accelerator, accelerator_agreement, accelerator_tables, parts
from benchmarks.accelerator_entrants import Network

TINY = accelerator.Sizes(
    network=Network("tiny", 8, 3, "bfloat16"),
    eigen_network=Network("tiny", 8, 3, "bfloat16"),
    batch_size=4,
    eigen_batch=4,
    most=8,
    matrices=((1, 8), (3, 8), (1, 12)),
    eigh_most=8,
    rounds=1,
)
PARTS = [part.name for part in accelerator.plan(TINY)]


# === Agreement ========================================================================


@pytest.mark.parametrize("name", accelerator_agreement.CASES)
def test_sums_in_another_order_agree_and_a_wrong_gradient_does_not(name):
    case = accelerator_agreement.CASES[name]
    results, others = {}, {}
    for dtype in ("float32", "bfloat16"):
        program, (params, probe, *batch) = accelerator_agreement.problem(case, dtype)
        program = jax.jit(program)
        results[dtype] = program(params, probe, *batch)
        others[dtype] = program(params, probe, *(x[::-1] for x in batch))
    single, half = results["float32"], results["bfloat16"]
    row = accelerator_agreement.compared(others["float32"], single)
    assert row["agrees"], row
    # The probe's products with the inverses are no gradient, nor zero.
    assert accelerator_agreement.error(single["inverses"], single["updates"]) > 1e-2
    row = accelerator_agreement.compared(others["bfloat16"], single, half)
    assert row["agrees"], row
    for factor in (1.01, np.nan):  # a percent is no rounding of float32
        wrong = jax.tree.map(lambda x, f=factor: f * x, single["gradients"])
        row = accelerator_agreement.compared(single | {"gradients": wrong}, single)
        assert not row["agrees"]
    # As if the kernels were those of another layer: far beyond bfloat16.
    wrong = jax.tree.map(lambda x: x[::-1] if x.ndim else x, half["updates"])
    row = accelerator_agreement.compared(half | {"updates": wrong}, single, half)
    assert not row["agrees"]
