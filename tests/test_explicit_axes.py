"""Axes of type Explicit, jax.make_mesh's default, leave all numbers as they are."""

import contextlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lbopt
from lbopt import explicit_axes
from tests.problems import Mlp, Problem, assert_close, classify, labels

KEY = jax.random.key(3)


class Body(nn.Module):
    """One layer of a scanned stack."""

    @nn.compact
    def __call__(self, x, _):
        return nn.tanh(nn.Dense(8, name="dense")(x)), None


class Net(nn.Module):
    """A convolution, a norm layer, scanned layers and an array of its own."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.LayerNorm(name="norm")(nn.Conv(4, (3, 3), name="conv")(x)))
        x = x.reshape(x.shape[0], -1)[:, :8]
        stack = nn.scan(
            Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=2
        )
        x, _ = stack(name="stack")(x, None)
        x = x * self.param("gain", nn.initializers.constant(0.5), (8,))[None]
        return nn.Dense(4, name="head")(x)


def loss_fn(params, x, y):
    logits = Net().apply({"params": params}, x)
    logits = lbopt.likelihood(logits, "categorical")
    # Not by an index of each example, which Explicit axes refuse in plain JAX too.
    picked = jnp.sum(jax.nn.log_softmax(logits) * jax.nn.one_hot(y, 4), -1)
    return -jnp.mean(picked)


@pytest.fixture(scope="module")
def problem():
    x = jax.random.normal(jax.random.key(0), (8, 4, 4, 2))
    params = Net().init(jax.random.key(1), x)["params"]
    return Problem(loss_fn, params, (x, labels(8, 4)))


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4,), ("data",))


def on(mesh, tree, *spec):
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(*spec)))


@pytest.mark.parametrize("fisher", ["empirical", "sampled"])
def test_curvature_of_rows_on_an_explicit_axis(problem, mesh, fisher):
    # "reduce" sums over locations before it sums over examples.
    sharing = "reduce" if fisher == "sampled" else "expand"
    layers = problem.trace(weight_sharing=sharing)
    kinds = {layer.block.kind for layer in layers.preconditioned.values()}
    assert kinds == {"kronecker", "unit_wise", "diagonal"}
    evaluate = lbopt.value_grad_and_curvature(loss_fn, layers, fisher=fisher)
    f = jax.jit(lambda p, x, y: evaluate(p, x, y, rng=KEY))
    expected = f(problem.params, *problem.args)
    placed = on(mesh, problem.params), *on(mesh, problem.args, "data")
    found = f(*placed)
    assert_close(found, expected, rtol=1e-4)
    for x in jax.tree.leaves(found):
        assert x.sharding.is_fully_replicated
    if fisher == "empirical":
        with jax.set_mesh(mesh):
            assert_close(f(*placed), expected, rtol=1e-4)


@pytest.fixture(scope="module")
def small():
    problem = classify(Mlp(width=4, classes=4))
    layers = problem.trace()
    return problem, layers, problem.evaluate(layers)


@pytest.mark.parametrize("context", [True, False])
def test_steps_on_an_explicit_axis(small, mesh, context):
    problem, layers, _ = small
    tx = lbopt.kfac(0.1, layers, damping=1e-2, kl_clip=1e-2)
    evaluate = lbopt.value_grad_and_curvature(problem.loss_fn, layers)

    @jax.jit
    def step(params, state, x, y):
        _, grads, curvature = evaluate(params, x, y, due=lbopt.refresh(state))
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    expected = step(problem.params, tx.init(problem.params), *problem.args)
    placed = on(mesh, problem.params), *on(mesh, problem.args, "data")
    # In its context new arrays are on the mesh, elsewhere the state is on none.
    with jax.set_mesh(mesh) if context else contextlib.nullcontext():
        found = step(placed[0], tx.init(placed[0]), *placed[1:])
    assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("jit", [True, False])
def test_gradients_that_are_split(small, mesh, jit):
    """As under FSDP: updates keep the layout of their gradients."""
    problem, layers, (loss, grads, curvature) = small
    core = lbopt.scale_by_kfac(layers, damping=1e-2)
    tx = lbopt.clip_by_kl(core, 1e-4, 0.1)
    if jit:
        tx = optax.chain(tx, lbopt.nlcg(0.1, preconditioner=None))

    def update(grads, params):
        state = tx.init(params)
        return tx.update(grads, state, params, curvature=curvature, value=loss)[0]

    def split(x):
        return on(mesh, x, *[None] * (x.ndim - 1), "data")

    expected = update(grads, problem.params)
    given = jax.tree.map(split, (grads, problem.params))
    if jit:
        found = jax.jit(update)(*given)
    else:  # outside of jit, JAX has no mesh but the context's
        with jax.set_mesh(mesh):
            found = update(*given)
    assert_close(found, expected, rtol=1e-4)
    for x in jax.tree.leaves(found):
        assert x.sharding.spec[-1] == "data"


def test_axes_of_other_types_change_nothing():
    found = []

    def function(x):
        found.append(jax.typeof(x).sharding.mesh.axis_types)
        return x

    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    for x in (np.ones(2, np.float32), on(mesh, jnp.ones(2), "data")):
        assert explicit_axes.on_auto_axes(function, (x,), PartitionSpec()) is x
    assert len(found) == 2
