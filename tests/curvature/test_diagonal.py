"""The diagonal fallback, from its definition."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbopt.curvature import diagonal
from tests.problems import BATCH, FEATURES, assert_equal, classify


class Gate(nn.Module):
    """A dense layer between two parameters that no rule knows."""

    @nn.compact
    def __call__(self, x):
        gain = self.param("gain", nn.initializers.ones, (FEATURES,))
        temperature = self.param("temperature", nn.initializers.ones, ())
        return nn.Dense(3, name="dense")(nn.tanh(x * gain[None])) * temperature


@pytest.mark.parametrize("name", ["gain", "temperature"])
def test_the_statistic_is_the_square_of_the_mean_gradient(name):
    problem = classify(Gate())
    layers = problem.trace()
    assert (layers[name].block.kind, layers[name].fallback) == ("diagonal", True)
    x, y = problem.args
    each = jax.vmap(jax.grad(problem.loss_fn), (None, 0, 0))
    gradients = each(problem.params, x[:, None], y[:, None])
    mean = np.asarray(gradients[name], np.float64).mean(0)
    f = problem.captured(layers)[name].f
    np.testing.assert_allclose(f, BATCH * mean**2, rtol=1e-4)


def test_natural_gradient_divides_by_the_damped_diagonal():
    block = diagonal.diagonal_block("gain", (2, 3), jnp.float32)
    f = jnp.arange(6.0).reshape(2, 3)
    inverses = block.invert(diagonal.DiagonalFactors(f), 1e-2)
    natural = block.precondition(inverses, {"gain": jnp.full((2, 3), 2.0)})
    np.testing.assert_allclose(natural["gain"], 2 / (f + 1e-2), rtol=1e-6)


def test_bfloat16_gradients_are_squared_in_float32():
    block = diagonal.diagonal_block("gain", (2,), jnp.float32)
    g = jnp.asarray([1.0078125, 3e-15], jnp.bfloat16)
    for due in (True, False):
        sums = block.estimate(None, g, diagonal.DiagonalFactors(due))
        assert sums.f.dtype == jnp.float32
        np.testing.assert_array_equal(sums.f, due * np.asarray(g, np.float32) ** 2)
    assert_equal(block.gradient(None, g), {"gain": g})


def test_first_inverses_are_the_identity():
    block = diagonal.diagonal_block("gain", (2,), jnp.float32)
    factors, inverses = block.init((3,))
    assert not factors.f.any()
    leaves = {"gain": jnp.arange(6.0).reshape(3, 2)}
    assert_equal(block.precondition(inverses, leaves), leaves)
