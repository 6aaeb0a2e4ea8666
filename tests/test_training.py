"""The training step, with and without curvature, and its reaction to bad numbers."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt
from lbopt import training
from tests import problems
from tests.devices import mesh_of
from tests.problems import (
    BATCH,
    CLASSES,
    WIDTH,
    NormNet,
    all_finite,
    assert_close,
    assert_equal,
    batch_of,
    inputs,
    labels,
)


def spoiled(number):
    batch = batch_of(7)
    return {**batch, "x": batch["x"].at[0, 0].set(number)}


RNG = jax.random.key(5)
loss_fn, *START, LAYERS = problems.norm_net()
PARAMS = START[0]


@functools.cache
def optimizer(name):
    """An optimizer, its layers and its step."""
    tx, layers = optax.sgd(0.1, momentum=0.9), None
    if name == "kfac":
        layers = LAYERS
        tx = lbopt.kfac(0.1, layers, damping=1e-2, periods=lbopt.Periods(2, 2))
    return tx, layers, training.make_train_step(loss_fn, tx, layers)


def test_init_state():
    state = training.init_state(optimizer("kfac")[0], *START, RNG)
    assert_equal([state.params, state.model_state], START)
    assert state.step == 0
    assert state.skipped == 0
    arrays = [x for x in jax.tree.leaves(state) if x is not state.rng]
    addresses = {x.unsafe_buffer_pointer() for x in arrays}
    outside = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(START)}
    assert len(addresses) == len(arrays)
    assert not addresses & outside


@pytest.mark.parametrize("name", ["kfac", "sgd"])
def test_a_step_equals_a_loop_by_hand(name):
    tx, layers, train_step = optimizer(name)
    with_gradient = jax.value_and_grad(loss_fn, has_aux=True)
    f = lbopt.value_grad_and_curvature(loss_fn, LAYERS, has_aux=True)

    @jax.jit
    def by_hand(params, model_state, opt_state, step, batch):
        rng, _ = jax.random.split(jax.random.fold_in(RNG, step))
        args, extra = (params, model_state, batch, rng), {}
        if layers is None:
            (loss, (model_state, metrics)), grads = with_gradient(*args)
        else:
            (loss, (model_state, metrics)), grads, extra["curvature"] = f(
                *args, due=lbopt.refresh(opt_state)
            )
        updates, opt_state = tx.update(grads, opt_state, params, **extra)
        params = optax.apply_updates(params, updates)
        metrics |= {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        return (params, model_state, opt_state), metrics

    state = training.init_state(tx, *START, RNG)
    own, noises = (*START, tx.init(PARAMS)), set()
    for step in range(4):
        own, expected = by_hand(*own, step, batch_of(step))
        state, metrics = train_step(state, batch_of(step))
        assert metrics.pop("skipped") == 0
        assert layers is None or metrics.pop("first_not_finite") == -1
        assert layers is None or 0 < metrics.pop("kl_scale") <= 1
        # Two programs: XLA may fuse them differently, and inverses amplify rounding.
        assert_close(metrics, expected, rtol=1e-4)
        noises.add(float(metrics["noise"]))
    assert_close(parts_of(state), own, rtol=1e-3, atol=1e-5)
    assert len(noises) == 4  # a new key at every step
    assert state.step == 4


@functools.cache
def two_steps(wrapper):
    """The parameters after them."""
    core = lbopt.kfac(0.1, LAYERS, damping=1e-2)
    tx = {
        "none": lambda: core,
        "inject_hyperparams": lambda: optax.inject_hyperparams(lbopt.kfac)(
            0.1, layers=LAYERS, damping=1e-2
        ),
        "apply_if_finite": lambda: optax.apply_if_finite(core, 3),
        "partition": lambda: optax.partition({"all": core}, "all"),
        "conditionally": lambda: optax.conditionally_mask(core, lambda step: step < 9),
    }[wrapper]()
    state = training.init_state(tx, *START, RNG)
    step = training.make_train_step(loss_fn, tx, LAYERS)
    for number in range(2):
        state, _ = step(state, batch_of(number))
    return state.params


@pytest.mark.parametrize(
    "kind", ["inject_hyperparams", "apply_if_finite", "partition", "conditionally"]
)
def test_an_optimizer_in_optax_s_wrappers(kind):
    assert_close(two_steps(kind), two_steps("none"), rtol=1e-3, atol=1e-5)


def test_the_step_donates_and_compiles_once():
    tx = lbopt.kfac(0.1, LAYERS)
    traces = []

    def counted(*args):
        traces.append(None)
        return loss_fn(*args)

    train_step = training.make_train_step(counted, tx, LAYERS, fisher="sampled")
    state = training.init_state(tx, *START, RNG)
    for step in range(3):
        old = state
        state, metrics = train_step(state, batch_of(step))
        assert all(x.is_deleted() for x in jax.tree.leaves(old.opt_state))
        assert np.isfinite(metrics["loss"])
    assert len(traces) == 1


@pytest.mark.parametrize("name", ["carried", "batch_stats"])
def test_on_a_mesh_averages_are_shared_and_examples_are_not(name):
    def carrying(params, model_state, batch, rng):
        del rng
        state = {
            key: {"x": batch["x"], "count": batch["x"][0, 0]} for key in model_state
        }
        return jnp.mean(batch["x"] @ params["w"]), (state, {})

    batch, mesh = batch_of(0), mesh_of(2)
    along = {"x": jnp.zeros_like(batch["x"]), "count": jnp.zeros([])}
    own = {"x": jnp.zeros((BATCH // 2, along["x"].shape[1])), "count": jnp.zeros([])}
    tx, start = optax.sgd(0.1), {"carried": along, "batch_stats": own}
    step = training.make_train_step(carrying, tx, mesh=mesh, per_example=("carried",))
    params = {"w": jnp.ones((along["x"].shape[1], 1))}
    state = training.init_state(tx, params, start, RNG, mesh)
    found = step(state, batch)[0].model_state[name]["x"]
    mean = (batch["x"][: BATCH // 2] + batch["x"][BATCH // 2 :]) / 2
    assert_close(found, batch["x"] if name == "carried" else mean)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"axis_name": "model"},
            r"axis_name='model' must be an axis of .*\{'data': 2\}",
        ),
        ({"accumulate": 0}, "accumulate=0 must be a whole number, ≥ 1; 1 evaluates"),
        (
            {"parallel": "pmap", "per_example": ("a",)},
            "parallel='pmap' needs a mesh of",
        ),
    ],
)
def test_settings_that_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        training.make_train_step(loss_fn, optax.sgd(0.1), mesh=mesh_of(2), **options)


@pytest.mark.parametrize(
    "x", [jnp.ones((6, 4)), jnp.ones([])], ids=["uneven", "scalar"]
)
def test_a_batch_that_cannot_be_cut_is_refused(x):
    tx, mesh = optax.sgd(0.1), mesh_of(2)
    step = training.make_train_step(loss_fn, tx, mesh=mesh, accumulate=2)
    state = training.init_state(tx, *START, RNG, mesh)
    with pytest.raises(
        ValueError, match=r"batch\['x'\] has shape .* 2 devices × acc.*=2"
    ):
        step(state, {"x": x})


def test_evaluation():
    state = training.init_state(optax.sgd(0.1), *START, RNG)

    def sums(params, model_state, batch):
        loss, _ = loss_fn(params, model_state, batch, RNG)
        return {"loss": loss * BATCH, "examples": BATCH}

    result = training.make_eval_step(sums)(state, batch_of(0))
    expected = loss_fn(*START, batch_of(0), RNG)[0] * BATCH
    assert_close(result["loss"], expected)
    assert result["examples"] == BATCH
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))


def test_bytes_of_the_state():
    state = optax.adam(0.1).init(PARAMS)
    count = sum(x.size for x in jax.tree.leaves(PARAMS))
    assert training.opt_state_bytes(state) == 4 * (2 * count + 1)
    kept = lbopt.scale_by_kfac(LAYERS).init(PARAMS)
    table = sum(x.state_bytes() for x in LAYERS.preconditioned.values())
    rest = training.opt_state_bytes(kept._replace(factors=(), inverses=()))
    assert training.opt_state_bytes(kept) == table + rest


# ------------------------------------------------------------------------ bad numbers


def counters(state):
    """``rejected`` of the K-FAC state, wherever in the chain it is."""
    return optax.tree.get(state.opt_state, "rejected").tolist()


def parts_of(state):
    return state.params, state.model_state, state.opt_state


@pytest.mark.parametrize("number", [jnp.nan, jnp.inf])
@pytest.mark.parametrize(
    ("name", "at"),  # the first step; with statistics; without
    [("kfac", 0), ("kfac", 2), ("kfac", 3), ("sgd", 3)],
)
def test_a_bad_batch_changes_nothing_and_training_goes_on(name, number, at):
    tx, _, train_step = optimizer(name)
    state, losses = training.init_state(tx, *START, RNG), []
    for step in range(8):
        bad = step == at
        before = jax.tree.map(jnp.copy, state)
        state, metrics = train_step(state, spoiled(number) if bad else batch_of(0))
        assert all_finite(parts_of(state))
        assert metrics["skipped"] == (step >= at)
        assert state.step == step + 1
        if bad:
            assert not np.isfinite(metrics["loss"])
            assert_equal(parts_of(state), parts_of(before))
        else:
            losses.append(float(metrics["plain"]))
    if name == "kfac":
        assert counters(state) == [0, 0, 0]
    assert losses[-1] < losses[0]


def test_a_gradient_whose_square_overflows_changes_nothing():
    def steep(params, model_state, batch, rng):
        del batch, rng
        return 1e30 * params["w"], (model_state, {})

    tx, params = optax.sgd(0.1), {"w": jnp.ones([])}
    state = training.init_state(tx, params, {}, RNG)
    state, metrics = training.make_train_step(steep, tx)(state, {})
    assert np.isfinite(metrics["loss"])
    assert metrics["skipped"] == 1
    assert_equal(state.params, params)


def test_a_gradient_in_float16_is_as_good_as_any():
    # The square of its norm overflows in its own type.
    params = {"w": jnp.zeros(4, jnp.float16)}

    def loss_fn(params, model_state, batch, rng):
        return jnp.mean(batch["x"] @ params["w"].astype(float)), (model_state, {})

    tx = optax.sgd(1e-3)
    step = training.make_train_step(loss_fn, tx)
    state = training.init_state(tx, params, {}, jax.random.key(0))
    state, metrics = step(state, {"x": jnp.full((8, 4), 500.0)})
    assert metrics["skipped"] == 0
    np.testing.assert_allclose(state.params["w"], -0.5, rtol=1e-3)


def test_statistics_that_overflow_are_rejected_and_counted():
    # Examples in pairs that pull in opposite directions: the gradient is small, the
    # square of each signal is not finite.
    def steep(params, model_state, batch, rng):
        logits, updated = NormNet().apply(
            {"params": params, **model_state}, batch["x"], mutable=["batch_stats"]
        )
        signs = jnp.where(labels(BATCH, 2) == 0, 1.0, -1.0)
        loss = jnp.mean(signs * jnp.sum(logits[:, :2], -1))
        return loss * batch["scale"][0], (updated, {})

    tx = lbopt.kfac(1e-30, LAYERS, damping=1e-2, momentum=None)
    train_step = training.make_train_step(steep, tx, LAYERS)
    state = training.init_state(tx, *START, RNG)
    batch = {"x": jnp.repeat(inputs(batch=BATCH // 2), 2, axis=0)}
    for scale, rejected in ((1.0, 0), (1e22, 1), (1.0, 1)):
        batch["scale"] = jnp.full(BATCH, scale)
        state, metrics = train_step(state, batch)
        assert metrics["skipped"] == 0
        assert counters(state) == [rejected] * 3
        assert all_finite((state.params, state.opt_state))


class Dead(nn.Module):
    """Rectified units that no input ever reaches."""

    @nn.compact
    def __call__(self, x):
        bias = nn.initializers.constant(-100.0)
        x = nn.relu(nn.Dense(WIDTH, bias_init=bias, name="dense")(x))
        return nn.Dense(CLASSES, name="head")(x)


@pytest.mark.parametrize("case", ["zero", "duplicated", "dead"])
def test_training_goes_on_with_singular_factors(case):
    batch = batch_of(0)
    if case == "zero":
        batch["x"] = jnp.zeros_like(batch["x"])
    if case == "duplicated":
        batch["x"] = jnp.tile(batch["x"][:, :1], (1, batch["x"].shape[1]))
    model = Dead() if case == "dead" else NormNet(between=nn.relu)
    variables = model.init(jax.random.key(1), batch["x"])
    params = variables.pop("params")
    loss_fn = problems.noisy_loss(model)
    layers = lbopt.trace_layers(loss_fn, params, variables, batch, RNG, has_aux=True)
    tx = lbopt.kfac(0.1, layers, damping=1e-8, kl_clip=1e-2)
    train_step = training.make_train_step(loss_fn, tx, layers)
    state = training.init_state(tx, params, variables, RNG)
    losses = []
    for _ in range(5):
        state, metrics = train_step(state, batch)
        losses.append(float(metrics["plain"]))
        assert all_finite((losses, *parts_of(state)))
    assert metrics["skipped"] == 0
    assert losses[-1] < losses[0]
