"""What the abstract trace of a loss finds, and what it refuses."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from lbopt.curvature import discovery
from tests.problems import CLASSES, FEATURES, classify

# --------------------------------------------------------------------------------- use


def test_used_arrays_are_those_with_a_gradient():
    params = {"a": jnp.ones(2), "b": {"c": jnp.ones(2), "d": jnp.ones(2)}}

    def loss(params, x):
        stopped = jax.lax.stop_gradient(params["b"]["d"])
        return jnp.sum(params["a"] * params["b"]["c"] * stopped * x)

    assert discovery.used_arrays(loss, params, (jnp.ones(2),)) == {("a",), ("b", "c")}


# ---------------------------------------------------------------------- raw transforms


class Raw(nn.Module):
    """A bound layer under a transform of JAX's own."""

    transform: str

    def setup(self):
        self.dense = nn.Dense(CLASSES)

    def __call__(self, x):
        if self.is_initializing():
            return self.dense(x)
        if self.transform == "vmap":
            return jax.vmap(self.dense)(x)
        if self.transform == "checkpoint":
            return jax.checkpoint(lambda x: self.dense(x))(x)
        if self.transform == "jit":
            return jax.jit(lambda x: self.dense(x))(x)
        return jax.lax.map(self.dense, x)


@pytest.mark.parametrize("transform", ["vmap", "checkpoint", "jit", "map"])
def test_a_raw_transform_around_a_bound_module_is_refused(transform):
    message = r"'dense' \(Dense\).*raw JAX transform.*jax.vmap.*nn.vmap.*model.apply"
    with pytest.raises(ValueError, match=message):
        classify(Raw(transform)).trace()


class Unrecognised(nn.Module):
    """A raw transform around parameters of no known layer is nobody's business."""

    @nn.compact
    def __call__(self, x):
        w = self.param("w", nn.initializers.ones, (FEATURES, CLASSES))
        return jax.vmap(lambda x: x @ w)(x)


def test_a_raw_transform_around_plain_arrays_is_allowed():
    assert list(classify(Unrecognised()).trace()) == ["w"]
