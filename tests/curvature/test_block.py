"""The two scalings, and work that is done only when it is due."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lbopt.curvature import block


def test_per_row_divides_each_copy_by_its_own_rows():
    total, rows = jnp.ones((2, 3, 3)), jnp.array([2.0, 4.0]).reshape(2, 1, 1)
    expected = np.ones((2, 3, 3)) / np.array([2.0, 4.0])[:, None, None]
    np.testing.assert_array_equal(block.per_row(total, rows), expected)
    # A vector, and a stack of convolution groups, of two copies.
    np.testing.assert_array_equal(block.per_row(total[..., 0], rows), expected[..., 0])
    grouped = block.per_row(total[:, None].repeat(5, 1), rows)
    np.testing.assert_array_equal(grouped, expected[:, None].repeat(5, 1))
    nothing = block.per_row(jnp.zeros((2, 2)), jnp.zeros((1, 1)))
    np.testing.assert_array_equal(nothing, np.zeros((2, 2)))


def test_per_example_undoes_the_mean_of_the_loss():
    g = np.random.default_rng(0).normal(size=(8, 3))
    signals = jnp.asarray(g / 8)  # of a mean over 8 examples
    total = jnp.einsum("ni,nj->ij", signals, signals)
    expected = np.einsum("ni,nj->ij", g, g) / 8
    np.testing.assert_allclose(block.per_example(total, 8), expected, rtol=1e-5)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("due", [False, True])
def test_when_makes_it_or_zeros_of_its_shape(due, traced):
    def make(x, y):
        return (x @ y, jnp.sum(x).astype(jnp.bfloat16))

    x, y = jnp.ones((2, 3)), jnp.ones((3, 4))

    def call(flag):
        return block.when(flag, make, x, y)

    product, total = jax.jit(call)(due) if traced else call(due)
    assert (product.shape, product.dtype) == ((2, 4), x.dtype)
    assert (total.shape, total.dtype) == ((), jnp.bfloat16)
    np.testing.assert_array_equal(product, np.full((2, 4), 3.0 * due))
    assert float(total) == 6.0 * due


def test_a_traced_flag_is_a_conditional_and_a_fixed_one_is_not():
    def make(x):
        return x @ x

    x = jnp.ones((2, 2))
    traced = str(jax.make_jaxpr(lambda f: block.when(f, make, x))(True))
    assert "cond[" in traced
    fixed = str(jax.make_jaxpr(lambda x: block.when(True, make, x))(x))
    assert "cond[" not in fixed
    assert "dot_general" in fixed
    off = str(jax.make_jaxpr(lambda x: block.when(False, make, x))(x))
    assert "dot_general" not in off


@pytest.mark.parametrize(
    ("param", "statistics"),
    [
        (jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float32),
        (jnp.float32, jnp.float32),
        (jnp.float64, jnp.float64),
    ],
)
def test_statistics_are_at_least_float32(param, statistics):
    with jax.enable_x64(True):
        assert block.statistics_dtype(param) == statistics


def test_rows_are_counted_in_every_lane_of_a_vmap():
    x = jnp.array([[1.0, 2.0], [jnp.nan, 3.0], [4.0, jnp.inf]])
    assert float(block.count_rows(5, x, jnp.float32).reshape(())) == 5
    counts = jax.vmap(lambda lane: block.count_rows(5, lane, jnp.float32), out_axes=0)(
        x
    )
    np.testing.assert_array_equal(counts, np.full((3, 1, 1), 5.0))
    # Without data the result would not be mapped, and a sum over lanes would miss it.
    jaxpr = jax.make_jaxpr(
        jax.vmap(lambda lane: block.count_rows(5, lane, jnp.float32))
    )(x)
    assert jaxpr.jaxpr.outvars[0].aval.shape == (3, 1, 1)


def test_weights_are_spread_over_the_axes_after_theirs():
    assert block.spread(jnp.ones((2, 3)), 4).shape == (2, 3, 1, 1)
    assert block.spread(jnp.ones(2), 1).shape == (2,)
