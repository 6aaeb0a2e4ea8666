"""LARS and NLCG compute the same on any devices, in micro-batches, and when resumed."""

import functools
import re

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lbopt
from lbopt import training
from tests.devices import mesh_of, spread
from tests.problems import assert_equal, assert_near_largest
from tests.test_distributed import PARAMS, ROUNDING, batch_of, layers, loss_fn

STEPS = 8
ONE_DEVICE = lbopt.Placement()


def lars(**_):
    return lbopt.lars(optax.linear_schedule(0.5, 0.1, STEPS), trust_coefficient=0.1)


def nlcg(**_):
    return lbopt.nlcg(0.05, control_period=2)


def nlcg_polak_ribiere(**_):
    return lbopt.nlcg(0.05, beta="polak_ribiere", step_control="online")


def nlcg_kfac(placement=ONE_DEVICE):
    core = lbopt.scale_by_kfac(layers(), damping=1e-2, placement=placement)
    return lbopt.nlcg(0.02, preconditioner=core, axis_name=placement.axis_name)


ON_TWO, ON_FOUR = {"devices": 2}, {"devices": 4, "accumulate": 2}
IN_PARTS, BY_PMAP = {"accumulate": 4}, {"devices": 4, "parallel": "pmap"}
WAYS = [
    *[(make, how) for make in (lars, nlcg) for how in (ON_TWO, ON_FOUR, IN_PARTS)],
    (nlcg_polak_ribiere, ON_TWO),
    (lars, BY_PMAP),
    (nlcg_kfac, ON_FOUR),
]


def start(make, devices=None, **options):
    """A first state and its step."""
    mesh = mesh_of(devices)
    tx = make(**spread(devices, "memory" if devices == 4 else "comm"))
    known = layers() if "kfac" in make.__name__ else None
    state = training.init_state(tx, PARAMS, {}, jax.random.key(1), mesh)
    return state, training.make_train_step(loss_fn, tx, known, mesh, **options)


def run(state, step, steps=range(STEPS)):
    """The last state of a run, and its losses."""
    losses = []
    for i in steps:
        state, metrics = step(state, batch_of(i))
        losses.append(float(metrics["loss"]))
    return state, losses


@functools.cache
def reference(make):
    state, losses = run(*start(make))
    return state.params, losses


@pytest.mark.parametrize(
    ("make", "how"), WAYS, ids=lambda x: getattr(x, "__name__", str(x))
)
def test_the_work_may_be_spread(make, how):
    state, losses = run(*start(make, **how))
    expected, expected_losses = reference(make)
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), expected, PARAMS)
    assert min(jax.tree.leaves(moved)) > 0.01
    np.testing.assert_allclose(losses, expected_losses, rtol=ROUNDING)
    assert_near_largest(state.params, expected, ROUNDING)


@pytest.mark.parametrize("make", [lars, nlcg], ids=lambda make: make.__name__)
def test_a_run_is_resumed(make):
    (state, step), (like, _) = start(make), start(make)
    state, _ = run(state, step, range(STEPS // 2))
    saved = flax.serialization.to_bytes(state._replace(rng=()))
    state = flax.serialization.from_bytes(like._replace(rng=()), saved)
    state, _ = run(state._replace(rng=like.rng), step, range(STEPS // 2, STEPS))
    assert_equal(state.params, reference(make)[0])


# ------------------------------------------------------- parameters cut over devices


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": "hager_zhang"},
        {"beta": "dai_yuan"},
    ],
    ids=str,
)
def test_cut_parameters_need_two_reductions(options):
    mesh = mesh_of(4)
    rows, whole = (NamedSharding(mesh, PartitionSpec(*a)) for a in (("data",), ()))
    params = {f"w{i}": jnp.linspace(-1, i, 32).reshape(8, 4) for i in range(5)}
    grads = [jax.tree.map(lambda w, k=k: jnp.cos(k + 3 * w), params) for k in range(4)]
    tx = lbopt.scale_by_nlcg(0.1, **options)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, value=1.0))

    def course(place):
        p, state = place(params), place(tx.init(params))
        results = []
        for g in grads:
            updates, state = update(place(g), state, p)
            results.append(updates)
        return results, update.lower(place(grads[0]), state, p).compile().as_text()

    def cut(tree):
        return jax.device_put(
            tree, jax.tree.map(lambda x: rows if x.ndim else whole, tree)
        )

    (alone, _), (spread, text) = course(lambda tree: tree), course(cut)
    for a, b in zip(jax.tree.leaves(spread), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    reductions = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
    assert len(reductions) == 2
    # Nothing but scalars is sent.
    assert all(not dims for dims in re.findall(r"f32\[(.*?)\]", "".join(reductions)))
    assert not re.findall(r" (all-gather|reduce-scatter|all-to-all)(-start)?\(", text)
