"""Meshes of several axes and of Explicit axes, and what a step refuses on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lbopt
from lbopt import mesh_step, sharding, training
from lbopt.sharding import Sharded
from tests.problems import Mlp, assert_close, classify, inputs, labels

PROBLEM = classify(Mlp(width=4))
RNG = jax.random.key(2)
AUTO = AxisType.Auto


def loss_fn(params, model_state, batch, rng):
    del rng
    # A batch of nested dictionaries.
    loss = PROBLEM.loss_fn(params, batch["inputs"]["x"], batch["targets"]["y"])
    return loss, (model_state, {})


BATCH = {"inputs": {"x": inputs(batch=8)}, "targets": {"y": labels(8)}}


@functools.cache
def layers():
    return lbopt.trace_layers(
        loss_fn, PROBLEM.params, {}, BATCH, RNG, has_aux=True, batch_size=8
    )


def kfac(*placement):
    settings = {"placement": lbopt.Placement(*placement)} if placement else {}
    return lbopt.kfac(0.1, layers(), damping=1e-2, kl_clip=1e-3, **settings)


def run(tx, mesh=None, axis="data", batch=BATCH, steps=2, curved=True, **options):
    state = training.init_state(tx, PROBLEM.params, {}, RNG, mesh, axis_name=axis)
    step = training.make_train_step(
        loss_fn,
        tx,
        layers() if curved else None,
        mesh,
        axis_name=axis,
        batch_size=8 if curved else None,
        **options,
    )
    for _ in range(steps):
        state, metrics = step(state, batch)
    assert metrics["skipped"] == 0
    return state.params


@functools.cache
def on_one_device():
    """A loop by hand."""
    tx, evaluate = kfac(), lbopt.value_grad_and_curvature(PROBLEM.loss_fn, layers())

    @jax.jit
    def step(params, state):
        _, grads, curvature = evaluate(params, inputs(batch=8), labels(8))
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    params, state = PROBLEM.params, tx.init(PROBLEM.params)
    for _ in range(2):
        params, state = step(params, state)
    return params


def two_axes(kind):
    return jax.make_mesh((2, 2), ("replica", "fsdp"), axis_types=(kind, kind))


BOTH = ("replica", "fsdp")


@pytest.mark.parametrize(
    ("kind", "placement"),
    [
        (AUTO, (BOTH, 4, "memory")),
        (AxisType.Explicit, (BOTH, 4)),
        (AUTO, ("fsdp", 2)),  # the other axis repeats the work
    ],
)
def test_examples_over_axes_of_a_mesh_of_two(kind, placement):
    params = run(kfac(*placement), two_axes(kind), placement[0])
    assert_close(params, on_one_device(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("with_mesh", [True, False])
def test_a_batch_that_lies_on_an_explicit_axis(with_mesh):
    mesh = jax.make_mesh((4,), ("data",))
    batch = jax.device_put(BATCH, NamedSharding(mesh, PartitionSpec("data")))
    tx = kfac("data", 4) if with_mesh else kfac()
    params = run(tx, mesh if with_mesh else None, batch=batch)
    assert_close(params, on_one_device(), rtol=1e-3, atol=1e-5)


# ------------------------------------------------------- functions of the whole batch


def searched(search, **options):
    core = lbopt.scale_by_kfac(layers(), damping=1e-2, **options)
    return optax.chain(core, optax.scale(-1.0), search)


@pytest.mark.parametrize(
    ("name", "mesh"),
    [("lbfgs", two_axes(AUTO)), ("zoom", two_axes(AUTO)), ("backtracking", None)],
    ids=["lbfgs", "zoom", "backtracking"],
)
def test_line_searches_see_the_loss_of_the_whole_batch(name, mesh):
    search = {
        "zoom": optax.scale_by_zoom_linesearch(4),
        "backtracking": optax.scale_by_backtracking_linesearch(4, store_grad=True),
    }.get(name)

    def make(**options):
        return optax.lbfgs() if search is None else searched(search, **options)

    tx, params = make(), PROBLEM.params
    whole = functools.partial(PROBLEM.loss_fn, x=inputs(batch=8), y=labels(8))
    evaluate = lbopt.value_grad_and_curvature(
        lambda p: whole(p), layers(), batch_size=8
    )

    @jax.jit
    def by_hand(params, state):
        value, grads, curvature = evaluate(params)

        def value_fn(params, curvature=None):
            del curvature
            return whole(params)

        extra = {} if search is None else {"curvature": curvature}
        updates, state = tx.update(
            grads, state, params, value=value, grad=grads, value_fn=value_fn, **extra
        )
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(2):
        params, state = by_hand(params, state)
    spread = {} if mesh is None else {"placement": lbopt.Placement(BOTH, 4)}
    found = run(make(**spread), mesh, BOTH, curved=search is not None)
    assert_close(found, params, rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("axis", ["model", ("replica", "model"), ("fsdp", "fsdp"), ()])
def test_axes_that_a_mesh_does_not_have(axis):
    message = r"axis_name=.* must be an axis of the mesh \{'replica': 2, 'fsdp': 2\}"
    with pytest.raises(ValueError, match=message):
        training.make_train_step(
            loss_fn, optax.sgd(0.1), mesh=two_axes(AUTO), axis_name=axis
        )


@pytest.mark.parametrize("placed", [True, False])
def test_a_forgotten_axis_size(placed):
    mesh, tx = sharding.make_mesh(jax.devices()[:4]), kfac("data", 1)
    step = training.make_train_step(loss_fn, tx, layers(), mesh)
    where = mesh if placed else None
    with pytest.raises(
        ValueError, match=r"axis_size=1 .* lbopt.Placement\('data', 4\)"
    ):
        step(training.init_state(tx, PROBLEM.params, {}, RNG, where), BATCH)


def test_multi_steps():
    def state_of(tx):
        return training.init_state(tx, PROBLEM.params, {}, RNG)

    around = optax.MultiSteps(kfac(), 2)
    message = r"optax\.MultiSteps .*make_train_step\(accumulate=\.\.\.\)"
    for tx in (around, around.gradient_transformation()):
        with pytest.raises(ValueError, match=message):
            state_of(tx)
    # Within partition too, and for a state that another function made.
    tx = optax.partition({"a": around.gradient_transformation()}, "a")
    state = state_of(optax.sgd(0.1))._replace(opt_state=tx.init(PROBLEM.params))
    with pytest.raises(ValueError, match=message):
        training.make_train_step(loss_fn, tx, layers())(state, BATCH)
    # Around others it takes the mean of two gradients: of the same, one gradient.
    found = run(optax.MultiSteps(optax.sgd(0.1), 2), curved=False)
    expected = run(optax.sgd(0.1), steps=1, curved=False)
    assert_close(found, expected)


@pytest.mark.parametrize("batch_size", [0, 6])
def test_numbers_of_terms_that_are_refused(batch_size):
    with pytest.raises(ValueError, match=r"batch_size=.* must be a"):
        training.make_train_step(
            loss_fn, kfac(), layers(), accumulate=4, batch_size=batch_size
        )


def test_marked_arrays_are_split_and_layers_found():
    marked = Sharded({"x": jnp.ones((2, 3)), "y": jnp.ones((2, 1))})
    tree = {"marked": marked, "whole": (jnp.arange(4.0), jnp.zeros([]))}
    assert mesh_step.split_layers(tree) == {"x", "y"}
    assert mesh_step.split_layers(tree["whole"]) == set()
    along, whole = PartitionSpec(("a", "b")), PartitionSpec()
    assert mesh_step.batch_specs(tree, ("a", "b"))["whole"] == (along, whole)
    assert sharding.specs(tree, ("a", "b"))["marked"].shards["x"] == along


def test_placements():
    assert lbopt.Placement(BOTH, 4).axis_name == BOTH
    for wrong in ((), ("a", "a")):
        with pytest.raises(ValueError, match=r"axis_name=.* must be a string, a tu"):
            lbopt.Placement(wrong, 4)
    for inverses in ("memory", 0.5, np.float32(0)):
        with pytest.raises(ValueError, match=r"inverses=.* must have axis_name"):
            lbopt.Placement(inverses=inverses)
