"""The memory plan: against the arrays of a state, and against XLA's own count."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest

import lbopt
from lbopt import memory_plan, sharding, training
from lbopt.transforms.kfac_state import KfacState
from tests.devices import mesh_of, spread
from tests.problems import NormNet, noisy_loss

BATCH, FEATURES, WIDTH, CLASSES = 32, 24, 40, 10
STATE = 6  # the plan's fields that come from shapes


NET = NormNet(width=WIDTH, classes=CLASSES)
loss_fn = noisy_loss(NET)
BATCH_SHAPES = {
    "x": jax.ShapeDtypeStruct((BATCH, FEATURES), jnp.float32),
    "y": jax.ShapeDtypeStruct((BATCH,), jnp.int32),
}


@functools.cache
def start() -> Any:
    variables = dict(NET.init(jax.random.key(0), jnp.ones((2, FEATURES))))
    return variables.pop("params"), variables, jax.random.key(1)


@functools.cache
def layers():
    params, model_state, rng = start()
    batch = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), BATCH_SHAPES)
    return lbopt.trace_layers(loss_fn, params, model_state, batch, rng, has_aux=True)


OPTIMIZERS = {
    "sgd": lambda **_: optax.sgd(0.1, momentum=0.9),
    "lars": lambda **_: lbopt.lars(0.1),
    "nlcg": lambda **_: lbopt.nlcg(0.1),
    "kfac": lambda **options: lbopt.kfac(0.1, layers(), **options),
    "sp_ngd": lambda **options: lbopt.sp_ngd(0.1, layers(), **options),
}
CURVATURE = {"kfac", "sp_ngd"}


class Case(NamedTuple):
    """An optimizer on one device, or on several with its inverses spread or not."""

    name: str
    devices: int
    placement: str = "comm"

    def build(self):
        """The optimizer and its mesh."""
        if self.devices == 1:
            return OPTIMIZERS[self.name](), None
        options = spread(self.devices, self.placement)
        return OPTIMIZERS[self.name](**options), mesh_of(self.devices)


CASES = [Case(name, devices) for name in OPTIMIZERS for devices in (1, 4)]
CASES += [Case(name, 4, "memory") for name in sorted(CURVATURE)]
case_of = functools.partial(
    pytest.mark.parametrize, "case", ids=lambda case: "-".join(map(str, case))
)


def shapes_of(tx):
    return jax.eval_shape(functools.partial(training.init_state, tx), *start())


def assert_near(plan, state, mesh, program, **options):
    placed = memory_plan.on_mesh(state, BATCH_SHAPES, mesh, **options)
    with_xla = memory_plan.with_xla(plan, program.lower(*placed).compile())
    assert with_xla[:STATE] == plan[:STATE]
    assert with_xla.arguments == pytest.approx(plan.total, rel=0.02)
    assert with_xla.temporaries is not None


@pytest.mark.parametrize(
    "whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["args", "step"]
)
@case_of(CASES)
def test_shapes_alone_come_near_the_compilers_count(case, whole):
    tx, mesh = case.build()
    own = layers() if case.name in CURVATURE else None
    step = training.make_train_step(loss_fn, tx, own, mesh)
    state = shapes_of(tx)
    plan = memory_plan.plan(state, BATCH_SHAPES, case.devices)
    assert (plan.factors > 0, plan.inverses > 0) == (case.name in CURVATURE,) * 2
    arguments = jax.jit(lambda *arguments: arguments)
    assert_near(plan, state, mesh, step if whole else arguments)


@case_of([Case("sp_ngd", 1), Case("kfac", 4, "memory")])
def test_parts_are_the_bytes_of_the_first_devices_arrays(case):
    tx, mesh = case.build()
    state = jax.jit(functools.partial(training.init_state, tx))(*start())
    if mesh is not None:
        state = sharding.place(state, mesh, "data")
    plan = memory_plan.plan(shapes_of(tx), BATCH_SHAPES, case.devices)

    def is_kfac(node):
        return isinstance(node, KfacState)

    nodes = jax.tree.leaves(state.opt_state, is_leaf=is_kfac)
    (curvature,) = filter(is_kfac, nodes)
    factors = curvature.factors, curvature.before, curvature.traces
    assert plan.parameters == on_first_device(state.params)
    assert plan.model_state == on_first_device(state.model_state)
    assert plan.factors == on_first_device(factors)
    assert plan.inverses == on_first_device((curvature.inverses, curvature.kept))
    rest = on_first_device(state.opt_state) - plan.factors - plan.inverses
    assert plan.optimizer == rest


def on_first_device(tree):
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def test_what_is_spread_is_divided():
    one, comm, memory = (
        memory_plan.plan(shapes_of(case.build()[0]), BATCH_SHAPES, case.devices)
        for case in (Case("kfac", 1), Case("kfac", 4), Case("kfac", 4, "memory"))
    )
    n_a, n_g = (FEATURES + 1, WIDTH + 1), (WIDTH, CLASSES)
    triangles = sum(n * (n + 1) // 2 for n in (*n_a, *n_g)) + 3 * WIDTH
    traces = 4 * 5  # of A and G twice, and of F
    assert one.factors == 4 * triangles + traces
    # Each array's share is rounded up.
    assert comm.factors - traces == pytest.approx(triangles, rel=0.01)
    squares = sum(n**2 for n in (*n_a, *n_g))
    assert one.inverses == comm.inverses == 4 * (squares + 3 * WIDTH)
    # The two dense layers have owners of their own; the first one's is the larger.
    assert memory.inverses == 4 * (n_a[0] ** 2 + n_g[0] ** 2)
    assert one.batch == 4 * comm.batch == 4 * BATCH * (FEATURES + 1)
    assert one.parameters == comm.parameters == memory.parameters


def test_collections_along_the_batch_are_divided_too():
    tx = OPTIMIZERS["sgd"]()
    state = shapes_of(tx)
    carried = {"x": BATCH_SHAPES["x"], "count": jax.ShapeDtypeStruct((), jnp.int32)}
    full = state._replace(model_state={**state.model_state, "carried": carried})
    plan = functools.partial(memory_plan.plan, batch=BATCH_SHAPES, devices=4)
    more = plan(full, per_example=("carried",)).model_state - plan(state).model_state
    assert more == BATCH * FEATURES * 4 // 4 + 4
    mesh, along = mesh_of(4), {"per_example": ("carried",)}

    def carrying(params, model_state, batch, rng):
        own = {"batch_stats": model_state["batch_stats"]}
        loss, (updated, metrics) = loss_fn(params, own, batch, rng)
        return loss, ({**updated, "carried": model_state["carried"]}, metrics)

    step = training.make_train_step(carrying, tx, None, mesh, **along)
    assert_near(plan(full, **along), full, mesh, step, **along)


def test_the_line_names_what_there_is():
    plan = memory_plan.MemoryPlan(102_228_128, 0, 0, 999, 1_000, 19_267_584)
    line = "memory per device: parameters 102 MB, inverses 999 B, optimizer 1 kB, "
    assert str(plan) == line + "batch 19.3 MB"
    compiled = plan._replace(arguments=1_150_000_000, temporaries=2_300_000)
    assert str(compiled).endswith("; XLA: arguments 1.15 GB, temporaries 2.3 MB")


def test_a_state_of_other_devices_is_refused():
    tx, _ = Case("kfac", 4).build()
    with pytest.raises(ValueError, match=r"devices=1 must be 4, the number"):
        memory_plan.plan(shapes_of(tx), BATCH_SHAPES)
