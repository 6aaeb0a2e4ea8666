"""The measurement of an accelerator, carried out on a CPU."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    accelerator,
    accelerator_agreement,
    accelerator_inverses,
    accelerator_steps,
    accelerator_tables,
    parts,
)
from benchmarks.accelerator_entrants import Network

TINY = Network("tiny", 8, 3, "bfloat16")
PARTS = [part.name for part in accelerator.plan(accelerator.SMALL)]


def run_of(rows, before=None):
    return parts.Run(rows.__setitem__, time.time() + 60, before or {})


# === Agreement ========================================================================


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", accelerator_agreement.CASES)
def test_tolerances_hold_for_sums_in_another_order(name, dtype):
    case = accelerator_agreement.CASES[name]
    program, (params, probe, *batch) = accelerator_agreement.problem(case, dtype)
    program = jax.jit(program)
    here = program(params, probe, *batch)
    reversed_ = program(params, probe, *(x[::-1] for x in batch))
    allowed = accelerator_agreement.TOLERANCES[dtype]
    for key, tree in here.items():
        assert accelerator_agreement.error(reversed_[key], tree) <= allowed[key], key
    # An error of one part in five in the gradient alone is no rounding.
    wrong = jax.tree.map(lambda x: 1.2 * x, here["gradients"])
    assert accelerator_agreement.error(wrong, here["gradients"]) > allowed["gradients"]
