"""The diagonal fallback, from its definition and against the exact Fisher."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt
from lbopt.curvature import diagonal
from tests import oracles
from tests.oracles import quick_jit

DAMPING = 1e-2


class Gate(nn.Module):
    """A dense layer between two parameters that no rule knows."""

    @nn.compact
    def __call__(self, x):
        gain = self.param("gain", nn.initializers.ones, (4,))
        temperature = self.param("temperature", nn.initializers.ones, ())
        return nn.Dense(3)(nn.tanh(x * gain[None])) * temperature


def problem():
    rng = np.random.default_rng(0)
    x, y = jnp.float32(rng.normal(size=(8, 4))), jnp.asarray(rng.integers(0, 3, 8))
    params = {
        "gain": jnp.float32(rng.uniform(0.5, 1.5, 4)),
        "temperature": jnp.float32(1.3),
        "Dense_0": {
            "kernel": jnp.float32(rng.normal(size=(4, 3))),
            "bias": jnp.float32(rng.normal(size=3)),
        },
    }
    return params, x, y


def loss_fn(params, x, y):
    f = lbopt.likelihood(Gate().apply({"params": params}, x), "categorical")
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(f, y))


def fisher_diagonal(params, x, name):
    outputs = lambda p, x: Gate().apply({"params": p}, x)  # noqa: E731
    jac = quick_jit(jax.jacrev(outputs))(params, x)[name]
    jac = np.asarray(jac).reshape(8, 3, -1)
    inner = oracles.output_fisher(outputs(params, x), "categorical")
    diagonal = np.einsum("nep,neg,ngp->p", jac, inner, jac) / 8
    return diagonal.reshape(params[name].shape)


def evaluate(fisher, rng=None):
    params, x, y = problem()
    layers = lbopt.trace_layers(loss_fn, params, x, y)
    f = lbopt.value_grad_and_curvature(loss_fn, layers, fisher=fisher)
    if rng is None:
        return quick_jit(f)(params, x, y)
    return quick_jit(jax.vmap(lambda k: f(params, x, y, rng=k)[2]))(rng)


def test_unknown_parameters_fall_back_and_are_marked():
    layers = lbopt.trace_layers(loss_fn, *problem())
    for path in ("gain", "temperature"):
        assert layers[path].block.kind == "diagonal"
        assert layers[path].fallback


@pytest.mark.parametrize("name", ["gain", "temperature"])
def test_empirical_statistic_is_the_square_of_the_mean_gradient(name):
    params, x, y = problem()
    per_example = jax.vmap(jax.grad(loss_fn), (None, 0, 0))(
        params, x[:, None], y[:, None]
    )
    mean = np.asarray(per_example[name], np.float64).mean(0)
    f = evaluate("empirical")[2][name].f
    np.testing.assert_allclose(f, 8 * mean**2, rtol=1e-4)


@pytest.mark.parametrize("name", ["gain", "temperature"])
def test_exact_statistic_is_the_fishers_diagonal(name):
    params, x, _ = problem()
    f = evaluate("exact")[2][name].f
    np.testing.assert_allclose(f, fisher_diagonal(params, x, name), rtol=1e-4)


def test_sampled_statistic_has_the_fishers_diagonal_as_its_mean():
    params, x, _ = problem()
    drawn = evaluate("sampled", jax.random.split(jax.random.key(0), 4096))
    for name in ("gain", "temperature"):
        samples = np.asarray(drawn[name].f, np.float64)
        deviation = samples.std(0) / 64  # of a mean of 4,096
        expected = fisher_diagonal(params, x, name)
        assert (np.abs(samples.mean(0) - expected) < 5 * deviation).all()


def test_natural_gradient_divides_by_the_damped_diagonal():
    block = diagonal.diagonal_block("gain", (2, 3), jnp.float32)
    f = jnp.arange(6.0).reshape(2, 3)
    inverses = block.invert(diagonal.DiagonalFactors(f), DAMPING)
    natural = block.precondition(inverses, {"gain": jnp.full((2, 3), 2.0)})
    expected = 2 / (np.arange(6.0).reshape(2, 3) + DAMPING)
    np.testing.assert_allclose(natural["gain"], expected, rtol=1e-6)


def test_bfloat16_gradients_are_squared_in_float32():
    block = diagonal.diagonal_block("gain", (2,), jnp.float32)
    g = jnp.asarray([1.0078125, 3e-15], jnp.bfloat16)
    sums = block.estimate(None, g, diagonal.DiagonalFactors(True))
    assert sums.f.dtype == jnp.float32
    np.testing.assert_array_equal(sums.f, np.asarray(g, np.float32) ** 2)


def test_first_inverses_are_the_identity():
    block = diagonal.diagonal_block("gain", (2,), jnp.float32)
    factors, inverses = block.init((3,))
    assert not factors.f.any()
    leaves = {"gain": jnp.arange(6.0).reshape(3, 2)}
    natural = block.precondition(inverses, leaves)
    np.testing.assert_array_equal(natural["gain"], leaves["gain"])
