"""Gradients and curvature that several optimizers are given."""

import jax
import jax.numpy as jnp
import pytest

import lbopt
from tests.problems import Mlp, classify, inputs


@pytest.fixture(scope="session")
def gradients():
    """A problem, its layers, and gradients and curvature of three batches."""
    problem = classify(Mlp())
    layers = problem.trace()
    f = jax.jit(lbopt.value_grad_and_curvature(problem.loss_fn, layers))
    batches = [f(problem.params, inputs(i), problem.args[1])[1:] for i in range(3)]
    return problem.params, layers, jax.tree.map(lambda *x: jnp.stack(x), *batches)
