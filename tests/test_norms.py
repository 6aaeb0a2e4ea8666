"""Inner products and norms of narrow floating-point types, against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from lbopt import norms


@pytest.mark.parametrize(
    ("dtype", "size", "scale"),
    [
        (jnp.float16, 3, 300.0),  # the square overflows
        (jnp.bfloat16, 4096, 1.0),  # the sum stops at 256
        (jnp.float32, 3, 1e18),
    ],
)
def test_they_are_those_of_the_rounded_numbers(dtype, size, scale):
    rng = np.random.default_rng(0)
    u, v = (
        {"a": jnp.asarray(scale * rng.uniform(1, 2, size), dtype), "b": [jnp.ones([])]}
        for _ in range(2)
    )
    a, b = (np.append(np.asarray(x["a"], np.float64), 1.0) for x in (u, v))
    for found, expected in (
        (norms.inner(u, v), a @ b),
        (norms.squared_norm(u), a @ a),
    ):
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(float(found), expected, rtol=1e-5)


def test_wider_types_stay():
    x = jnp.ones(2, jnp.bfloat16)
    assert norms.precise([x])[0].dtype == norms.precise_dtype(x) == jnp.float32
    assert norms.precise_dtype(np.ones(2)) == jnp.float64
