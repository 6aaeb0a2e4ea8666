"""Signals whose outer products are the Fisher matrix of the outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbopt.curvature import signals
from lbopt.curvature.likelihood import Outputs
from tests import oracles

CASES = [
    ("categorical", (2, 3)),
    ("categorical", (2, 2, 3)),  # two events an example
    ("bernoulli", (2, 3)),
    ("bernoulli", (3,)),  # one logit an example
    ("normal", (2, 3)),
]


def outputs_of(distribution, shape):
    f = 1.5 * jax.random.normal(jax.random.key(0), shape)
    return Outputs(f, distribution, None, None)


@pytest.mark.parametrize(("distribution", "shape"), CASES)
def test_sampled_signals_have_the_fisher_matrix_for_covariance(distribution, shape):
    outputs, draws = outputs_of(distribution, shape), 20_000

    @oracles.quick_jit
    def moments(key):
        keys = jax.random.split(key, draws)
        drawn = jax.vmap(lambda k: signals.sampled_signal(outputs, k))(keys)
        rows = drawn.reshape(draws, -1)
        return jnp.mean(rows, 0), rows.T @ rows / draws

    mean, second = moments(jax.random.key(1))
    blocks = oracles.output_fisher(outputs.value, distribution)
    # Standard errors of either are below 1 / √draws ≈ 0.007; examples are independent.
    assert np.max(np.abs(mean)) < 0.04
    np.testing.assert_allclose(second, block_diagonal(blocks), atol=0.06)


@pytest.mark.parametrize(("distribution", "shape"), CASES)
def test_exact_signals_add_up_to_the_fisher_matrix(distribution, shape):
    outputs = outputs_of(distribution, shape)

    def by_example(signal):
        rows = signal.reshape(len(signal), -1)
        return jnp.einsum("ni,nj->nij", rows, rows)

    def by_batch(signal):
        # As of the gradient of a whole batch: examples are not told apart.
        flat = signal.reshape(-1)
        return jnp.outer(flat, flat)

    @oracles.quick_jit
    def both():
        together = signals.summed_exactly(outputs, by_example, one_by_one=False)
        return together, signals.summed_exactly(outputs, by_batch, one_by_one=True)

    together, one_by_one = both()
    blocks = oracles.output_fisher(outputs.value, distribution)
    assert oracles.error(together, blocks) < 1e-5
    assert oracles.error(one_by_one, block_diagonal(blocks)) < 1e-5


def test_signals_of_the_model_have_no_derivative():
    def square(f):
        outputs = Outputs(f, "categorical", None, None)
        signal = signals.sampled_signal(outputs, jax.random.key(0))
        return jnp.sum(signal**2)

    assert not np.any(jax.grad(square)(jnp.ones((2, 3))))


def block_diagonal(blocks):
    n, size, _ = blocks.shape
    whole = np.zeros((n, size, n, size))
    for i, block in enumerate(blocks):
        whole[i, :, i] = block
    return whole.reshape(n * size, n * size)
