"""Statistics of a part of the batch, of another batch, and on separate devices."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt
from lbopt import batch_functions, statistics_pass, training
from lbopt.collectives import Axis
from lbopt.curvature import signals
from tests import problems
from tests.devices import mesh_of, spread
from tests.oracles import quick_jit
from tests.problems import (
    CLASSES,
    all_finite,
    assert_close,
    assert_near_largest,
    cross_entropy,
    inputs,
)

SIZE = 16
RNG = jax.random.key(5)
loss_fn, PARAMS, MODEL_STATE, LAYERS = problems.norm_net()


def batch_of(seed, size=SIZE):
    return problems.batch_of(seed, size)


def started(tx, devices=None, loss=loss_fn, layers=LAYERS, **options):
    """The first state of a run, and its step."""
    mesh = mesh_of(devices)
    step = training.make_train_step(loss, tx, layers, mesh, **options)
    return training.init_state(tx, PARAMS, MODEL_STATE, RNG, mesh), step


def evaluate(loss, *args, **settings):
    """One evaluation on one device, of half of the batch for statistics."""
    settings = {"fisher": "empirical", "accumulate": 1, "per_example": ()} | settings
    function = statistics_pass.make_evaluate(
        loss, LAYERS, Axis(None, 1), fraction=0.5, devices=0, **settings
    )
    return quick_jit(function)(PARAMS, *args)


# ---------------------------------------------------------------------------- by hand


def parts_of(batch, count):
    """The shares of devices or micro-batches, in order."""
    split = jax.tree.map(lambda x: np.split(np.asarray(x), count), batch)
    return [{key: value[i] for key, value in split.items()} for i in range(count)]


def first_half(batch):
    return {key: x[: len(x) // 2] for key, x in batch.items()}


def mean_of(trees):
    return jax.tree.map(lambda *xs: sum(xs) / len(xs), *trees)


gradient = quick_jit(jax.value_and_grad(loss_fn, has_aux=True))
alone = lbopt.curvature_only(loss_fn, LAYERS, has_aux=True, fisher="empirical")
statistics = quick_jit(alone)


def gradient_by_hand(params, model_state, parts):
    """Loss without its noise, model state and gradient: the means over the parts."""
    found = [gradient(params, model_state, part, RNG) for part in parts]
    return mean_of([(aux[1]["plain"], aux[0], grads) for (_, aux), grads in found])


def statistics_by_hand(params, model_state, parts):
    return mean_of([statistics(params, model_state, part, RNG) for part in parts])


# ------------------------------------------------------------- of which examples


def keeping_all():
    """A transformation whose state has the last gradient and the last statistics."""
    return optax.chain(optax.trace(0.0), lbopt.scale_by_kfac(LAYERS, factor_decay=0.0))


HALF = {"statistics_fraction": 0.5}


@pytest.mark.parametrize(
    ("devices", "accumulate", "options"),
    [(None, 2, HALF), (2, 1, HALF), (2, 2, {}), (2, 1, {"parallel": "pmap"})],
)
def test_statistics_of_a_part_or_of_another_batch(devices, accumulate, options):
    state, step = started(keeping_all(), devices, accumulate=accumulate, **options)
    batch, count = batch_of(0, size=32), (devices or 1) * accumulate
    parts, other = parts_of(batch, count), None
    if options == HALF:  # the first examples of every part
        few = [first_half(part) for part in parts]
    else:
        other = batch_of(7)
        few = parts_of(other, count)
    loss, _, grads = gradient_by_hand(PARAMS, MODEL_STATE, parts)
    curvature = statistics_by_hand(PARAMS, MODEL_STATE, few)
    state, metrics = step(state, batch, other)
    assert_close(metrics["plain"], loss)
    # Sums in another order: some units in the last place of the largest entry.
    kept, factors = state.opt_state[0].trace, state.opt_state[1].factors
    assert_close(kept, grads, rtol=1e-5, atol=1e-6)
    packed = {path: LAYERS[path].block.pack(curvature[path]) for path in curvature}
    flat = jax.tree.map(lambda x: x.reshape(-1), (factors, packed))
    assert_close(*flat, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fraction", "few"), [(0.1, 2), (0.12, 2), (0.01, 1), (1.0, 16)]
)
def test_a_fraction_is_rounded_and_never_nothing(fraction, few):
    _, batch = statistics_pass._shortened(fraction, (), {}, batch_of(0))
    assert len(batch["x"]) == len(batch["y"]) == few


def test_a_fraction_of_what_the_model_carries_along_the_batch():
    def carrying(params, model_state, batch, rng):
        own = {"batch_stats": model_state["batch_stats"]}
        mixed = {**batch, "x": (batch["x"] + model_state["carried"]["x"]) / 2}
        loss, (updated, metrics) = loss_fn(params, own, mixed, rng)
        return loss, ({**updated, "carried": {"x": batch["x"]}}, metrics)

    batch, before = batch_of(0), {"x": batch_of(1)["x"]}
    state, due = (
        {**MODEL_STATE, "carried": before},
        lbopt.refresh(keeping_all().init(PARAMS)),
    )
    found = evaluate(carrying, state, batch, None, RNG, due, per_example=("carried",))
    few = first_half({"x": (batch["x"] + before["x"]) / 2, "y": batch["y"]})
    assert_close(found.curvature, statistics(PARAMS, MODEL_STATE, few, RNG), rtol=1e-5)
    assert_close(found.model_state["carried"]["x"], batch["x"])


@pytest.mark.parametrize("due", [True, False])
def test_a_fraction_in_the_bases_that_a_mask_brings(due):
    tx = lbopt.scale_by_kfac(LAYERS, eigenvalues="corrected")
    mask = {
        path: own._replace(
            **dict.fromkeys(set(own._fields) - {"a_basis", "g_basis"}, jnp.asarray(due))
        )
        for path, own in lbopt.refresh(tx.init(PARAMS)).items()
    }
    batch = batch_of(0)
    found = evaluate(loss_fn, MODEL_STATE, batch, None, RNG, mask).curvature
    expected = quick_jit(
        lambda p, batch, mask: alone(p, MODEL_STATE, batch, RNG, due=mask)
    )(PARAMS, first_half(batch), mask)
    assert_close(found, expected, rtol=1e-5)
    assert np.any(found["dense"].s) == due


# ------------------------------------------------------------------ separate devices

# The same sums in another order, amplified by the inverses of three steps; relative to
# the largest entry.
ROUNDING = 1e-4


def kfac(**options):
    return lbopt.kfac(0.05, LAYERS, damping=1e-2, periods=lbopt.Periods(2), **options)


def run_by_hand(devices, own, steps):
    """On one device: the last ``own`` parts are for the statistics, the others not."""
    tx = kfac()
    params, model_state, opt_state, losses = PARAMS, MODEL_STATE, tx.init(PARAMS), []
    update = quick_jit(tx.update)
    for step in range(steps):
        parts = parts_of(batch_of(step, size=8 * devices), devices)
        curvature = statistics_by_hand(params, model_state, parts[-own:])
        loss, model_state, grads = gradient_by_hand(params, model_state, parts[:-own])
        updates, opt_state = update(grads, opt_state, params, curvature=curvature)
        params = optax.apply_updates(params, updates)
        losses.append(float(loss))
    return (params, model_state), losses


@pytest.mark.parametrize(
    ("own", "parallel", "placement"),
    [
        (1, "shard_map", "comm"),
        pytest.param(2, "pmap", "memory", marks=pytest.mark.slow),
    ],
)
def test_the_last_devices_evaluate_the_statistics(own, parallel, placement):
    devices = 4
    tx = kfac(**spread(devices, placement))
    state, train_step = started(tx, devices, parallel=parallel, statistics_devices=own)
    expected, losses = run_by_hand(devices, own, steps=3)
    for step, loss in enumerate(losses):
        state, metrics = train_step(state, batch_of(step, size=8 * devices))
        np.testing.assert_allclose(metrics["plain"], loss, rtol=ROUNDING)
        if step == 0:
            early = jax.tree.map(np.asarray, state.params)
    assert_near_largest((state.params, state.model_state), expected, ROUNDING)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), early, expected[0])
    assert min(jax.tree.leaves(moved)) > 10 * ROUNDING  # something is at stake

    # What they see is in the statistics alone.
    bad = batch_of(3, size=8 * devices)
    bad["x"] = bad["x"].at[-1].set(jnp.nan)
    state, _ = train_step(state, batch_of(3, size=8 * devices))  # none is due here
    state, metrics = train_step(state, bad)
    assert metrics["skipped"] == 0
    rejected = optax.tree.get(state.opt_state, "rejected").tolist()
    assert rejected == [2, 2, 1]  # every statistic of dense, head and norm
    assert all_finite((state.params, state.model_state, state.opt_state))


def test_counters_and_keys_come_from_the_first_device():
    model = nn.Sequential([nn.Dense(CLASSES)])
    params = model.init(jax.random.key(1), inputs())["params"]

    def counting(params, model_state, batch, rng):
        state = {
            "steps": model_state["steps"] + 1,
            "odd": ~model_state["odd"],
            "key": rng,
            "mean": jnp.mean(batch["x"]),
        }
        f = model.apply({"params": params}, batch["x"])
        return cross_entropy(f, batch["y"]), (state, {})

    start = {
        "steps": jnp.zeros([], jnp.int32),
        "odd": jnp.asarray(False),
        "key": RNG,
        "mean": jnp.zeros([]),
    }
    batch, mesh = batch_of(0), mesh_of(2)
    layers = lbopt.trace_layers(counting, params, start, batch, RNG, has_aux=True)
    tx = lbopt.scale_by_kfac(layers, **spread(2))
    train_step = training.make_train_step(
        counting, tx, layers, mesh, statistics_devices=1
    )
    state = training.init_state(tx, params, start, RNG, mesh)
    for _ in range(3):
        state, _ = train_step(state, batch)
    found = state.model_state
    keys = jax.random.key_data(found["key"])
    for x, value in ((found["steps"], 3), (found["odd"], True), (keys, keys)):
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, value)
    assert_close(state.model_state["mean"], jnp.mean(batch["x"][: SIZE // 2]))


# ------------------------------------------------------------------ what a pass costs


@pytest.mark.parametrize(
    ("devices", "options"), [(None, HALF), (2, {"statistics_devices": 1})]
)
def test_a_pass_is_skipped_if_nothing_is_due(devices, options):
    passes = []

    def counted(params, model_state, batch, rng):
        jax.debug.callback(lambda: passes.append(None))
        return loss_fn(params, model_state, batch, rng)

    tx = lbopt.scale_by_kfac(LAYERS, periods=lbopt.Periods(3), **spread(devices))
    state, train_step = started(tx, devices, counted, **options)
    counts = []
    for step in range(4):
        state, _ = train_step(state, batch_of(step))
        jax.effects_barrier()
        counts.append(len(passes))
    assert np.diff([0, *counts]).tolist() == [2, 1, 1, 2]


SYNCHRONISED = problems.noisy_loss(problems.NormNet("data"))


def test_layers_that_combine_devices_may_have_a_separate_pass():
    # Its collectives are inside a conditional that all devices decide alike.
    tx = lbopt.kfac(0.05, LAYERS, periods=lbopt.Periods(2), **spread(2))
    state, train_step = started(tx, 2, SYNCHRONISED, **HALF)
    for step in range(3):
        state, metrics = train_step(state, batch_of(step))
    assert metrics["skipped"] == 0
    assert all_finite((state.params, state.opt_state))


def test_no_key_is_used_twice(monkeypatch):
    seen = {"loss": [], "labels": []}

    def note(name, rng):
        jax.debug.callback(
            lambda data: seen[name].append(tuple(data.tolist())),
            jax.random.key_data(rng),
        )

    def noting(params, model_state, batch, rng):
        note("loss", rng)
        return loss_fn(params, model_state, batch, rng)

    plain = signals.sampled_signal

    def noting_signal(outputs, rng):
        note("labels", rng)
        return plain(outputs, rng)

    monkeypatch.setattr(signals, "sampled_signal", noting_signal)
    due = lbopt.refresh(keeping_all().init(PARAMS))
    keys = batch_functions.keys_of_parts(RNG, Axis(None, 1), 2)
    batch = batch_of(0)
    evaluate(
        noting, MODEL_STATE, batch, None, keys, due, fisher="sampled", accumulate=2
    )
    jax.effects_barrier()
    assert len(seen["loss"]) == 4  # two micro-batches, two passes
    assert len(seen["labels"]) == 2
    assert len(set(seen["loss"] + seen["labels"])) == 6


# --------------------------------------------------------------------------- messages


@pytest.mark.parametrize("parallel", ["shard_map", "pmap"])
def test_a_loss_that_waits_for_other_devices(parallel):
    tx = lbopt.scale_by_kfac(LAYERS, **spread(2))
    state, train_step = started(
        tx, 2, SYNCHRONISED, parallel=parallel, statistics_devices=1
    )
    message = (
        r"statistics_devices=1, but the loss itself combines.*unbound axis name: data.*"
        "without axis_name"
    )
    with pytest.raises(ValueError, match=message):
        train_step(state, batch_of(0))


def test_an_unknown_name_in_a_loss_is_its_own():
    def broken(*args):
        return nowhere

    with pytest.raises(NameError, match="name 'nowhere' is not defined"):
        statistics_pass.require_no_collectives(
            broken, PARAMS, MODEL_STATE, batch_of(0), RNG, parts=2, devices=1
        )


def settings(fraction=1.0, devices=0, **others):
    return {"statistics_fraction": fraction, "statistics_devices": devices, **others}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (settings(0.0), r"statistics_fraction=0.0 must lie in \(0, 1\]; 1 takes"),
        (
            settings(devices=4),
            r"statistics_devices=4 must be below 4, the size of axis",
        ),
        (settings(devices=-1), r"statistics_devices=-1 must be a whole number, ≥ 0"),
        (settings(devices=1, mesh=None), r"statistics_devices=1 needs a mesh"),
        (settings(0.5, 1), r"statistics_devices=1 excludes statistics_fraction=0.5"),
        (
            settings(devices=1, per_example=("a",)),
            r"=1 excludes .*per_example=\('a',\)",
        ),
        (settings(0.5, layers=None), r"statistics_fraction=0.5 and .*=0 need layers"),
        (
            settings(devices=1, layers=None),
            r"=1.0 and statistics_devices=1 need layers",
        ),
    ],
)
def test_settings_out_of_range(options, message):
    options = {"layers": LAYERS, "mesh": mesh_of(4), **options}
    with pytest.raises(ValueError, match=message):
        training.make_train_step(loss_fn, optax.identity(), **options)


@pytest.mark.parametrize(
    ("devices", "options", "message"),
    [
        (2, {"layers": None}, "layers=None; pass layers"),
        (2, settings(0.5), "statistics_fraction=0.5 and statistics_devices=0 take"),
        (2, settings(devices=1), "=1.0 and statistics_devices=1 take"),
        (
            None,
            {"per_example": ("batch_stats",)},
            r"per_example=\('batch_stats',\) col",
        ),
    ],
)
def test_a_statistics_batch_that_is_not_used(devices, options, message):
    tx = lbopt.scale_by_kfac(LAYERS) if "layers" not in options else optax.identity()
    state, train_step = started(tx, devices, **options)
    message = f"statistics_batch is given, but .*{message}"
    with pytest.raises(ValueError, match=message):
        train_step(state, batch_of(0), batch_of(1))


@pytest.mark.parametrize(
    ("devices", "parallel"), [(None, "shard_map"), (2, "shard_map"), (2, "pmap")]
)
def test_a_statistics_batch_that_cannot_be_cut(devices, parallel):
    tx = lbopt.scale_by_kfac(LAYERS, **spread(devices))
    state, train_step = started(tx, devices, parallel=parallel, accumulate=2)
    message = (
        r"statistics_batch\['x'\] has shape \[7, 4\]; its leading size must be a "
        rf"multiple of {devices or 1} devices × accumulate=2"
    )
    with pytest.raises(ValueError, match=message):
        train_step(state, batch_of(0), batch_of(1, size=7))
