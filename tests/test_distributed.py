"""Several devices do what one does, under every way to spread the work."""

import functools
import re
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import lbopt
from lbopt import sharding, training
from lbopt.curvature import eigen_moments, factor
from tests.problems import cross_entropy

BATCH, STEPS = 16, 10
# Sums over examples are taken in another order on other numbers of devices; ten steps
# of a curvature with condition numbers near 1e3 amplify float32's 6e-8 to about this.
ROUNDING = 2e-5


class Net(nn.Module):
    """A convolution in groups, a norm layer and a dense layer: five statistics."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), strides=2, feature_group_count=2, name="conv")(x)
        x = nn.relu(nn.GroupNorm(2, name="norm")(x))
        return nn.Dense(3, name="dense")(x.reshape(len(x), -1))


def batch_of(seed):
    image = jax.random.normal(jax.random.key(seed), (BATCH, 4, 4, 2))
    return {"x": image, "y": jnp.arange(BATCH) % 3}


PARAMS = Net().init(jax.random.key(0), batch_of(0)["x"])["params"]


def loss_fn(params, model_state, batch, rng):
    del rng
    logits = lbopt.likelihood(
        Net().apply({"params": params}, batch["x"]), "categorical"
    )
    accuracy = jnp.mean(jnp.argmax(logits, -1) == batch["y"])
    return cross_entropy(logits, batch["y"]), (model_state, {"accuracy": accuracy})


def params_of(dtype):
    return jax.tree.map(lambda x: x.astype(dtype), PARAMS)


@functools.cache
def layers(dtype=jnp.float32, doubly_factored=None):
    args = (params_of(dtype), {}, batch_of(0), jax.random.key(0))
    return lbopt.trace_layers(
        loss_fn, *args, has_aux=True, doubly_factored=doubly_factored
    )


ROWS = 16
"""Inputs of the dense layer, a map of four locations and four channels."""


def maker(optimizer, rate, rows=None, **settings):
    """A function of further settings that makes an optimizer."""

    def make(**options):
        table = layers(doubly_factored=rows)
        return optimizer(rate, table, damping=1e-2, **settings, **options)

    return make


STAGGERED = lbopt.Periods(inverses=3, stagger=True)
LATER = lbopt.Periods(inverses=3, stagger=True, delay=2)
adaptive = maker(lbopt.sp_ngd, 0.02, momentum=0.5, stale_threshold=0.6)
periodic = maker(
    lbopt.kfac,
    0.05,
    periods=lbopt.Periods(statistics=2, inverses=3, stagger=True),
    block_size=7,
)
delayed = maker(lbopt.kfac, 0.05, periods=LATER, block_size=7)
corrected = maker(
    lbopt.kfac, 0.05, periods=STAGGERED, block_size=7, eigenvalues="corrected"
)
corrected_later = maker(
    lbopt.kfac,
    0.05,
    periods=lbopt.Periods(inverses=3, stagger=True, delay=1),
    block_size=7,
    eigenvalues="corrected",
)
three_factors = maker(lbopt.kfac, 0.05, rows=ROWS, periods=STAGGERED)


def also(*cases):
    """Further cases of a test, for the long run."""
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


class Course(NamedTuple):
    """What a run left behind."""

    params: dict
    due: np.ndarray
    losses: np.ndarray
    state: training.TrainState


def run(
    make,
    devices=None,
    parallel="shard_map",
    steps=STEPS,
    batch=batch_of,
    start=None,
    dtype=jnp.float32,
    doubly_factored=None,
    placement="comm",
    accumulate=1,
    **options,
):
    """A run of the training step on so many devices, None for no mesh.

    ``start(state, mesh)`` is where it starts, if not from the first state itself.
    """
    mesh = None
    if devices is not None:
        mesh = sharding.make_mesh(jax.devices()[:devices])
        options["placement"] = lbopt.Placement("data", devices, placement)
    tx = make(**options)
    state = training.init_state(tx, params_of(dtype), {}, jax.random.key(1), mesh)
    state = state if start is None else start(state, mesh)
    table = layers(dtype, doubly_factored)
    step = training.make_train_step(
        loss_fn, tx, table, mesh, parallel=parallel, accumulate=accumulate
    )
    due, losses = [], []
    for i in range(steps):
        state, metrics = step(state, batch(i))
        flags = eigen_moments.flags(lbopt.refresh(state.opt_state))
        due.append([bool(x) for x in flags])
        losses.append([float(metrics["loss"]), float(metrics["accuracy"])])
    params = jax.tree.map(np.asarray, state.params)
    return Course(params, np.asarray(due), np.asarray(losses), state)


@functools.cache
def on_one_device(make, **options):
    return run(make, **options)


@functools.cache
def half_on_four_devices(make):
    placement = "comm" if make is corrected else "memory"
    return run(make, 4, steps=STEPS // 2, placement=placement)


def assert_same(course, reference, rounding=ROUNDING):
    np.testing.assert_array_equal(course.due, reference.due)
    np.testing.assert_allclose(course.losses, reference.losses, rtol=rounding)
    for a, b in zip(
        jax.tree.leaves(course.params), jax.tree.leaves(reference.params), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=rounding, atol=rounding * np.abs(b).max())


@pytest.mark.parametrize(
    ("devices", "parallel", "placement"),
    [
        *[(2, "shard_map", "memory"), (8, "shard_map", 0.5), (4, "pmap", "comm")],
        *also(
            *[(1, "shard_map", p) for p in ("comm", "memory")],
            (2, "shard_map", "comm"),
            *[(4, "shard_map", p) for p in ("comm", "memory", 0.5)],
            *[(8, "shard_map", p) for p in ("comm", "memory")],
            *[(2, "pmap", "memory"), (8, "pmap", "memory")],
        ),
    ],
)
def test_adaptive_refresh_on_several_devices(devices, parallel, placement):
    reference = on_one_device(adaptive)
    # The clocks differ, so that something is at stake.
    assert 0 < reference.due[2:].mean() < 1
    course = run(adaptive, devices, parallel, placement=placement)
    assert_same(course, reference)


@pytest.mark.parametrize(
    ("devices", "placement"), [(2, "memory"), (8, 0.5), *also((4, "comm"))]
)
def test_staggered_periods_on_several_devices(devices, placement):
    reference = on_one_device(periodic)
    course = run(periodic, devices, placement=placement)
    assert_same(course, reference)
    # Every inverse is renewed once in a period of 3.
    steps = np.asarray(
        lbopt.curvature_state(course.state.opt_state).refresh.inverse_step
    )
    assert set(steps) == {STEPS - 3, STEPS - 2, STEPS - 1}


@pytest.mark.parametrize(
    ("devices", "parallel", "placement"),
    [
        (2, "shard_map", "memory"),
        (4, "pmap", "comm"),
        *also((8, "shard_map", 0.5)),
    ],
)
def test_delayed_inverses_on_several_devices(devices, parallel, placement):
    reference = on_one_device(delayed)
    course = run(delayed, devices, parallel, placement=placement)
    assert_same(course, reference)
    for state in (course.state, reference.state):
        # The turns of step 7 have effect at step 9, the last; those of 8 and 9 later.
        steps = np.asarray(lbopt.curvature_state(state.opt_state).refresh.inverse_step)
        assert set(steps) == {STEPS - 5, STEPS - 4, STEPS - 3}


@pytest.mark.parametrize(
    ("make", "devices", "parallel", "accumulate"),
    [
        (corrected, 2, "shard_map", 4),
        (corrected, 4, "pmap", 1),
        (corrected_later, 4, "shard_map", 1),
    ],
)
def test_corrected_eigenvalues_on_several_devices(make, devices, parallel, accumulate):
    reference = on_one_device(make)
    course = run(make, devices, parallel, accumulate=accumulate)
    assert_same(course, reference)
    moments = lbopt.curvature_state(course.state.opt_state).moments
    assert sorted(moments) == ["conv", "dense"]
    for one in moments.values():
        assert one.renewals == STEPS - 1


@pytest.mark.parametrize(
    ("devices", "parallel", "accumulate", "placement"),
    [
        (2, "shard_map", 2, "comm"),
        (8, "shard_map", 1, 0.5),
        *also((4, "pmap", 1, "memory"), (8, "shard_map", 1, "memory")),
    ],
)
def test_three_factors_on_several_devices(devices, parallel, accumulate, placement):
    assert layers(doubly_factored=ROWS)["dense"].block.kind == "doubly_factored"
    reference = on_one_device(three_factors, doubly_factored=ROWS)
    course = run(
        three_factors,
        devices,
        parallel,
        accumulate=accumulate,
        doubly_factored=ROWS,
        placement=placement,
    )
    assert_same(course, reference)
    assert_same_on_all_devices(course.state.params)


def test_accumulated_micro_batches_are_one_batch():
    assert_same(run(adaptive, accumulate=2), on_one_device(adaptive))
    assert_same(
        run(adaptive, 2, accumulate=4, placement="memory"), on_one_device(adaptive)
    )


@pytest.mark.parametrize(
    ("make", "devices", "placement"),
    [
        (adaptive, None, "comm"),
        (periodic, 8, 0.5),
        (corrected, 2, "comm"),
        *also((adaptive, 8, 0.5), (periodic, 2, "memory")),
    ],
)
def test_a_run_goes_on_with_other_devices(make, devices, placement):
    half = STEPS // 2
    before = half_on_four_devices(make)
    block_size = {adaptive: None, periodic: 7, corrected: 7}[make]

    def moved(state, mesh):
        like = jax.eval_shape(lambda: state)
        before_state = jax.device_get(before.state)
        state = lbopt.reshard(before_state, like, layers(), block_size=block_size)
        return state if mesh is None else sharding.place(state, mesh, "data")

    after = run(
        make,
        devices,
        steps=STEPS - half,
        batch=lambda i: batch_of(i + half),
        start=moved,
        placement=placement,
    )
    whole = Course(
        after.params,
        np.concatenate([before.due, after.due]),
        np.concatenate([before.losses, after.losses]),
        after.state,
    )
    assert_same(whole, on_one_device(make))


def test_jit_alone_places_the_work():
    mesh = sharding.make_mesh(jax.devices()[:4])
    split = NamedSharding(mesh, PartitionSpec("data"))
    course = run(adaptive, batch=lambda i: jax.device_put(batch_of(i), split))
    assert_same(course, on_one_device(adaptive))


# ------------------------------------------------------------------ the program


def prepared(tx, devices, table=None, placed=True, **options):
    """The training step on so many devices, and its first state."""
    mesh = sharding.make_mesh(jax.devices()[:devices])
    where = mesh if placed else None
    state = training.init_state(tx, PARAMS, {}, jax.random.key(1), where)
    return training.make_train_step(loss_fn, tx, table, mesh, **options), state


def program(placement):
    tx = adaptive(placement=lbopt.Placement("data", 4, placement))
    step, state = prepared(tx, 4, layers())
    return step.lower(state, batch_of(0)).compile().as_text()


def elements(text, collective):
    """How many numbers each collective of a kind has, largest operand first."""
    sizes = []
    for line in text.splitlines():
        found = re.search(rf"= (.*?) {collective}(-start)?\(", line)
        for dims in re.findall(r"\w+\[([\d,]*)\]", found.group(1)) if found else ():
            sizes.append(int(np.prod([int(d) for d in dims.split(",") if d] or [1])))
    return sorted(sizes, reverse=True)


def test_memory_reduces_nothing_on_all_devices():
    text = program("memory")
    assert elements(text, "reduce-scatter")
    assert elements(text, "all-gather")
    assert elements(text, "all-to-all")
    # Flags, traces and the loss; a factor or gradient would have more numbers.
    assert elements(text, "all-reduce")[0] <= 4
    assert min(x.size for x in jax.tree.leaves(PARAMS) if x.ndim > 1) > 4


def test_comm_reduces_gradients_and_no_factors():
    text = program("comm")
    assert elements(text, "reduce-scatter")
    largest_gradient = max(x.size for x in jax.tree.leaves(PARAMS))
    largest_factor = max(f.size for x in layers().values() for f in x.block.factors)
    assert elements(text, "all-reduce")[0] <= largest_gradient < largest_factor


@pytest.mark.parametrize("placement", ["comm", "memory"])
def test_each_inverse_is_computed_once(placement, monkeypatch):
    counted = []
    plain = factor._invert_symmetric

    def counting(packed, damping):
        jax.debug.callback(lambda: counted.append(1))
        return plain(packed, damping)

    monkeypatch.setattr(factor, "_invert_symmetric", counting)
    tx = lbopt.scale_by_kfac(layers(), placement=lbopt.Placement("data", 4, placement))
    matrices = 2 * 2 + 2  # A and G of the convolution's two groups and of the dense
    step, state = prepared(tx, 4, layers())
    state, _ = step(state, batch_of(0))
    jax.effects_barrier()
    assert len(counted) == matrices
    assert int(state.opt_state.report.inversions) == matrices + 1  # and the norm layer


# ------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("axis", "made_for", "message"),
    [
        (
            ("data", 4),
            4,
            r"axis_size=4 of the optimizer's placement, but the axis 'data' has 2 dev",
        ),
        (
            ("data", 2),
            4,
            r"axis_size=4 of the optimizer's placement.*lbopt\.reshard",
        ),
        (("model", 2), 2, "axis_name='model' is (no|not a) mapped axis here"),
    ],
)
def test_devices_that_do_not_fit(axis, made_for, message):
    tx = adaptive(placement=lbopt.Placement(*axis))
    like = adaptive(placement=lbopt.Placement("data", made_for))
    step, _ = prepared(tx, 2, layers(), placed=False)
    state = training.init_state(like, PARAMS, {}, jax.random.key(1))
    with pytest.raises(ValueError, match=message):
        step(state, batch_of(0))


def test_a_mesh_without_the_axis_and_a_batch_that_cannot_be_cut():
    with pytest.raises(
        ValueError, match=r"axis_name='model' must be an axis of the mesh"
    ):
        prepared(optax.sgd(0.1), 2, axis_name="model")
    step, state = prepared(optax.sgd(0.1), 3, accumulate=2)
    message = r"batch\['x'\] has shape \[16, 4, 4, 2\].*multiple of 3 devices × accum"
    with pytest.raises(ValueError, match=message):
        step(state, batch_of(0))


@pytest.mark.parametrize(
    ("placement", "averaged", "message"),
    [
        (("data", 4), False, "placement= over axis 'data' .* check_vma=False"),
        ((), False, r"each device's own under jax\.shard_map; average it"),
        ((), True, None),
    ],
)
def test_shard_map_with_its_default_check_vma(placement, averaged, message):
    x, y = jax.random.normal(jax.random.key(0), (BATCH, 4)), jnp.arange(BATCH) % 3
    params = {"head": nn.Dense(3).init(jax.random.key(1), x)["params"]}

    def loss(params, x, y):
        return cross_entropy(nn.Dense(3).apply({"params": params["head"]}, x), y)

    table = lbopt.trace_layers(loss, params, x, y, batch_size=BATCH)
    tx = lbopt.scale_by_kfac(table, placement=lbopt.Placement(*placement))
    state = tx.init(params)

    def evaluate(params, x, y, **due):
        f = lbopt.value_grad_and_curvature(loss, table, batch_size=len(x))
        return f(params, x, y, **due)

    def own(params, state, x, y):
        # Without the cast jax.grad adds gradients up over the devices.
        params = jax.lax.pcast(params, "data", to="varying")
        _, grads, curvature = evaluate(params, x, y, due=lbopt.refresh(state))
        if averaged:
            grads, curvature = jax.lax.pmean((grads, curvature), "data")
        return tx.update(grads, state, params, curvature=curvature)[0]

    whole, along = PartitionSpec(), PartitionSpec("data")
    specs = (whole, sharding.specs(state, "data"), along, along)
    mesh = sharding.make_mesh(jax.devices()[:4])
    mapped = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=whole)
    if message is not None:
        with pytest.raises(ValueError, match=message):
            jax.jit(mapped)(params, state, x, y)
        return
    _, grads, curvature = evaluate(params, x, y)
    expected = tx.update(grads, state, params, curvature=curvature)[0]
    np.testing.assert_allclose(
        jax.jit(mapped)(params, state, x, y)["head"]["kernel"],
        expected["head"]["kernel"],
        rtol=1e-3,
        atol=1e-6,
    )


def test_an_optimizer_without_an_axis_gets_means():
    make = functools.partial(lbopt.kfac, 0.05, layers(), damping=1e-2)

    def without(**options):
        del options  # no placement
        return make()

    assert_same(run(without, 4, steps=3), run(make, steps=3))


@pytest.mark.parametrize("placement", ["comm", "memory"])
def test_the_clip_is_that_of_the_mean_gradient(placement):
    def clipped(**options):
        table = layers(jnp.float64)
        return lbopt.kfac(0.1, table, damping=1e-2, kl_clip=1e-3, **options)

    # In float64: after steps so short, the first biases are differences of nearly
    # equal numbers, of which float32 keeps few digits.
    with jax.enable_x64(True):
        reference = run(clipped, steps=3, dtype=jnp.float64)
        assert float(reference.state.opt_state[1].scale) < 1  # the bound is felt
        course = run(clipped, 4, steps=3, dtype=jnp.float64, placement=placement)
        assert_same(course, reference, rounding=1e-11)
        assert_same_on_all_devices(course.state.params)


def test_what_another_optimizer_of_a_partition_sees_is_averaged():
    def partitioned(**options):
        curved = optax.chain(
            lbopt.scale_by_kfac(layers(), damping=1e-2, **options), optax.scale(-0.05)
        )
        plain = optax.with_extra_args_support(optax.sgd(0.1))
        labels = {"conv": "curved", "norm": "curved", "dense": "plain"}
        return optax.partition({"curved": curved, "plain": plain}, labels)

    course = run(partitioned, 4, steps=3, placement="memory")
    assert_same(course, run(partitioned, steps=3))
    assert_same_on_all_devices(course.state.params)


def assert_same_on_all_devices(tree):
    for x in jax.tree.leaves(tree):
        copies = [np.asarray(shard.data) for shard in x.addressable_shards]
        for copy in copies[1:]:
            np.testing.assert_array_equal(copy, copies[0])
