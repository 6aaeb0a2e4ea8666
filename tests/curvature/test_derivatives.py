"""Losses that contain derivatives of the network are marked, never half counted."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import lbopt
from tests import oracles

MODEL = nn.Sequential([nn.Dense(6), nn.tanh, nn.Dense(1)])
X = jax.random.normal(jax.random.key(0), (8, 3))
PARAMS = MODEL.init(jax.random.key(1), X)["params"]


def value(params, x):
    return MODEL.apply({"params": params}, x)[..., 0]


def slope(params):
    return jax.vmap(jax.grad(lambda z: value(params, z)))


def plain(params, x):
    return jnp.mean(value(params, x) ** 2)


def by_inputs(params, x):
    return jnp.mean(jnp.sum(slope(params)(x) ** 2, -1))


def laplacian(params, x):
    hessians = jax.vmap(jax.hessian(lambda z: value(params, z)))(x)
    return jnp.mean(jnp.trace(hessians, axis1=-2, axis2=-1) ** 2)


def forward_mode(params, x):
    moved = jax.jvp(lambda z: value(params, z), (x,), (jnp.ones_like(x),))[1]
    return jnp.mean(moved**2)


def forward_over_reverse(params, x):
    def one(z):
        gradient = jax.grad(lambda z: value(params, z))
        return jnp.sum(jax.jvp(gradient, (z,), (jnp.ones_like(z),))[1])

    return jnp.mean(jax.vmap(one)(x) ** 2)


def sobolev(params, x):
    return plain(params, x) + by_inputs(params, x)


def gradient_penalty_by_parameters(params, x):
    grads = jax.grad(plain)(params, x)
    return plain(params, x) + sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))


def value_of_value_and_grad(params, x):
    value_of, _ = jax.value_and_grad(lambda z: plain(params, z))(x)
    return value_of


def inside_jit(params, x):
    return jnp.mean(jax.jit(lambda x: slope(params)(x))(x) ** 2)


def meta_gradient(params, x):
    grads = jax.grad(plain)(params, x)
    return plain(jax.tree.map(lambda w, g: w - 0.1 * g, params, grads), x)


MARKED = [
    by_inputs,
    laplacian,
    forward_mode,
    forward_over_reverse,
    sobolev,
    gradient_penalty_by_parameters,
    value_of_value_and_grad,
    inside_jit,
    meta_gradient,
]


@pytest.mark.parametrize("loss_fn", MARKED)
def test_derivatives_are_marked_and_diagonal(loss_fn):
    layers = lbopt.trace_layers(loss_fn, PARAMS, X, batch_size=8)
    assert {layer.block.kind for layer in layers.values()} == {"diagonal"}
    reasons = {layer.why for layer in layers.values() if layer.used}
    assert all("derivative of it" in r or "mapped by the loss" in r for r in reasons)
    f = lbopt.value_grad_and_curvature(loss_fn, layers)
    found, grads, curvature = jax.jit(f)(PARAMS, X)
    expected, grads0 = jax.jit(jax.value_and_grad(loss_fn))(PARAMS, X)
    assert oracles.error(found, expected) < 1e-6
    # The last bias has no part in a derivative; its gradient is zero.
    errors = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), grads, grads0)
    assert max(jax.tree.leaves(errors)) < 1e-5
    squares = 8 * grads0["layers_0"]["kernel"] ** 2
    assert oracles.error(curvature["layers_0/kernel"].f, squares) < 1e-5


def test_strict_refuses_them():
    with pytest.raises(ValueError, match="derivative of it"):
        lbopt.trace_layers(by_inputs, PARAMS, X, strict=True, batch_size=8)


def test_a_derivative_that_no_gradient_passes_is_none():
    def loss_fn(params, x):
        weights = jax.lax.stop_gradient(slope(params)(x))
        return jnp.mean(value(params, x) ** 2 * jnp.sum(weights**2, -1))

    layers = lbopt.trace_layers(loss_fn, PARAMS, X, batch_size=8)
    assert {layer.block.kind for layer in layers.values()} == {"kronecker"}


def test_layers_beside_the_derivative_keep_their_blocks():
    other = nn.Sequential([nn.Dense(2)])
    params = {"inner": PARAMS, "outer": other.init(jax.random.key(2), X)["params"]}

    def loss_fn(params, x):
        forces = slope(params["inner"])(x)
        return jnp.mean(other.apply({"params": params["outer"]}, forces) ** 2)

    layers = lbopt.trace_layers(loss_fn, params, X, batch_size=8)
    assert layers["outer/layers_0"].block.kind == "kronecker"
    assert layers["inner/layers_0/kernel"].block.kind == "diagonal"


def test_a_custom_derivative_of_the_loss_is_no_derivative_of_the_network():
    @jax.custom_jvp
    def energy(params, x):
        return plain(params, x)

    @energy.defjvp
    def rule(primals, tangents):
        (params, x), (dparams, _) = primals, tangents
        out, dout = jax.jvp(lambda p: value(p, x), (params,), (dparams,))
        return plain(params, x), jnp.mean(2 * out * dout)

    layers = lbopt.trace_layers(energy, PARAMS, X, batch_size=8)
    assert {layer.block.kind for layer in layers.values()} == {"kronecker"}
    plain_layers = lbopt.trace_layers(plain, PARAMS, X, batch_size=8)
    curvature = lbopt.value_grad_and_curvature(energy, layers)(PARAMS, X)[2]
    expected = lbopt.value_grad_and_curvature(plain, plain_layers)(PARAMS, X)[2]
    assert oracles.error(curvature["layers_0"].g, expected["layers_0"].g) < 1e-5
