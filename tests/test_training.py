"""The step builder, with and without curvature, and what it does with bad numbers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt
from lbopt import training
from tests.problems import (
    BATCH,
    CLASSES,
    WIDTH,
    all_finite,
    assert_close,
    assert_equal,
    cross_entropy,
    inputs,
    labels,
)


class Net(nn.Module):
    """A dense layer, batch normalisation, a head."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(WIDTH, name="dense")(x)
        x = nn.BatchNorm(use_running_average=False, momentum=0.9, name="norm")(x)
        return nn.Dense(CLASSES, name="head")(nn.relu(x))


MODEL = Net()


def loss_fn(params, model_state, batch, rng):
    logits, updated = MODEL.apply(
        {"params": params, **model_state}, batch["x"], mutable=["batch_stats"]
    )
    logits = lbopt.likelihood(logits, "categorical")
    loss = cross_entropy(logits, batch["y"])
    return loss, (updated, {"noise": jax.random.normal(rng)})


def batch_of(seed):
    return {"x": inputs(seed), "y": labels()}


def spoiled(number):
    batch = batch_of(7)
    return {**batch, "x": batch["x"].at[0, 0].set(number)}


RNG = jax.random.key(5)


@pytest.fixture(scope="module")
def start():
    variables = MODEL.init(jax.random.key(1), inputs())
    return variables["params"], {"batch_stats": variables["batch_stats"]}


@pytest.fixture(scope="module")
def layers(start):
    return lbopt.trace_layers(
        loss_fn, *start, batch_of(0), RNG, has_aux=True, strict=True
    )


@pytest.fixture(scope="module")
def kfac(layers):
    tx = lbopt.kfac(0.1, layers, damping=1e-2, stats_period=2, inverse_period=2)
    return tx, training.make_train_step(loss_fn, tx, layers)


def test_init_state(start, kfac):
    state = training.init_state(kfac[0], *start, RNG)
    assert_equal(state.params, start[0])
    assert_equal(state.model_state, start[1])
    assert state.step == 0
    assert state.skipped == 0
    arrays = [x for x in jax.tree.leaves(state) if x is not state.rng]
    addresses = {x.unsafe_buffer_pointer() for x in arrays}
    outside = {x.unsafe_buffer_pointer() for x in jax.tree.leaves(start)}
    assert len(addresses) == len(arrays)
    assert not addresses & outside


def test_a_step_equals_a_loop_by_hand(start, layers, kfac):
    tx, train_step = kfac
    f = lbopt.value_grad_and_curvature(loss_fn, layers, has_aux=True)

    @jax.jit
    def by_hand(params, model_state, opt_state, step, batch):
        rng, _ = jax.random.split(jax.random.fold_in(RNG, step))
        (loss, (model_state, metrics)), grads, curvature = f(
            params, model_state, batch, rng, due=lbopt.refresh(opt_state)
        )
        updates, opt_state = tx.update(grads, opt_state, params, curvature=curvature)
        params = optax.apply_updates(params, updates)
        return (params, model_state, opt_state), {"loss": loss, **metrics}

    state = training.init_state(tx, *start, RNG)
    own = (*start, tx.init(start[0]))
    noises = set()
    for step in range(4):
        own, expected = by_hand(*own, step, batch_of(step))
        state, metrics = train_step(state, batch_of(step))
        skipped = metrics.pop("skipped")
        # Two programs: XLA may fuse them differently, and inverses amplify rounding.
        assert_close(metrics, expected, rtol=1e-4)
        noises.add(float(metrics["noise"]))
        assert skipped == 0
    assert_close(
        (state.params, state.model_state, state.opt_state), own, rtol=1e-3, atol=1e-5
    )
    assert len(noises) == 4  # a new key at every step
    assert state.step == 4


def test_plain_sgd_through_the_same_step(start):
    tx = optax.sgd(0.1, momentum=0.9)
    train_step = training.make_train_step(loss_fn, tx)
    state = training.init_state(tx, *start, RNG)
    params, model_state = start
    opt_state = tx.init(params)
    gradient = jax.jit(jax.grad(loss_fn, has_aux=True))
    for step in range(3):
        grads, (model_state, _) = gradient(params, model_state, batch_of(step), RNG)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        state, metrics = train_step(state, batch_of(step))
    assert set(metrics) == {"loss", "noise", "skipped"}
    assert_close((state.params, state.model_state), (params, model_state))
    bad, metrics = train_step(jax.tree.map(jnp.copy, state), spoiled(jnp.nan))
    assert metrics["skipped"] == 1
    assert_equal(bad.params, state.params)
    assert_equal(bad.opt_state, state.opt_state)


def test_the_step_donates_and_compiles_once(start, layers):
    tx = lbopt.kfac(0.1, layers)
    traces = []

    def counted(*args):
        traces.append(None)
        return loss_fn(*args)

    train_step = training.make_train_step(counted, tx, layers, fisher="sampled")
    state = training.init_state(tx, *start, RNG)
    for step in range(3):
        old = state
        state, metrics = train_step(state, batch_of(step))
        assert all(x.is_deleted() for x in jax.tree.leaves(old.opt_state))
        assert np.isfinite(metrics["loss"])
    assert len(traces) == 1


def test_curvature_of_a_part_of_the_parameters(start, layers):
    tx = optax.partition(
        {"kfac": lbopt.kfac(0.1, layers), "sgd": optax.sgd(0.1)},
        {"dense": "kfac", "norm": "sgd", "head": "kfac"},
    )
    train_step = training.make_train_step(loss_fn, tx, layers)
    state = training.init_state(tx, *start, RNG)
    first = None
    for _ in range(4):
        state, metrics = train_step(state, batch_of(0))
        first = metrics["loss"] if first is None else first
    assert metrics["loss"] < first


def test_evaluation(start, kfac):
    state = training.init_state(kfac[0], *start, RNG)

    def sums(params, model_state, batch):
        loss, _ = loss_fn(params, model_state, batch, RNG)
        return {"loss": loss * BATCH, "examples": BATCH}

    result = training.make_eval_step(sums)(state, batch_of(0))
    expected = loss_fn(*start, batch_of(0), RNG)[0] * BATCH
    assert_close(result["loss"], expected)
    assert result["examples"] == BATCH
    assert not any(x.is_deleted() for x in jax.tree.leaves(state))


def test_bytes_of_the_state(start, layers):
    params = start[0]
    state = optax.adam(0.1).init(params)
    count = sum(x.size for x in jax.tree.leaves(params))
    assert training.opt_state_bytes(state) == 4 * (2 * count + 1)
    kept = lbopt.scale_by_kfac(layers).init(params)
    table = sum(x.state_bytes() for x in layers.preconditioned.values())
    rest = training.opt_state_bytes(kept._replace(factors=(), inverses=()))
    assert training.opt_state_bytes(kept) == table + rest


# ------------------------------------------------------------------------ bad numbers


def counters(state):
    """``rejected`` of the K-FAC state, wherever in the chain it is."""
    return optax.tree.get(state.opt_state, "rejected").tolist()


@pytest.mark.parametrize("number", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("at", [0, 2, 3])  # the first; with statistics; without
def test_a_bad_batch_changes_nothing_and_training_goes_on(start, kfac, number, at):
    tx, train_step = kfac
    state, losses = training.init_state(tx, *start, RNG), []
    for step in range(8):
        bad = step == at
        before = jax.tree.map(jnp.copy, state)
        state, metrics = train_step(state, spoiled(number) if bad else batch_of(0))
        assert all_finite((state.params, state.model_state, state.opt_state))
        assert metrics["skipped"] == (step >= at)
        assert state.step == step + 1
        if bad:
            assert not np.isfinite(metrics["loss"])
            kept = (state.params, state.model_state, state.opt_state)
            assert_equal(kept, (before.params, before.model_state, before.opt_state))
        else:
            losses.append(float(metrics["loss"]))
    assert counters(state) == [0, 0, 0]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("number", [jnp.nan, jnp.inf])
def test_a_bad_batch_under_apply_if_finite(start, layers, number):
    # A loop of the user's own, that looks at the gradient alone.
    tx = optax.apply_if_finite(lbopt.kfac(0.1, layers, damping=1e-2), 3)
    f = lbopt.value_grad_and_curvature(loss_fn, layers, has_aux=True)

    @jax.jit
    def step(params, state, batch):
        _, grads, curvature = f(params, start[1], batch, RNG, due=lbopt.refresh(state))
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    params, state = start[0], tx.init(start[0])
    for i, batch in enumerate([batch_of(0), spoiled(number), batch_of(0)]):
        before = params
        params, state = step(params, state, batch)
        assert all_finite((params, state))
        if i == 1:
            assert_equal(params, before)
    assert state.total_notfinite == 1


def test_statistics_that_overflow_are_rejected_and_counted(start, layers):
    # Examples in pairs that pull in opposite directions: the gradient is small, the
    # square of each signal is not finite.
    def steep(params, model_state, batch, rng):
        logits, updated = MODEL.apply(
            {"params": params, **model_state}, batch["x"], mutable=["batch_stats"]
        )
        signs = jnp.where(labels(BATCH, 2) == 0, 1.0, -1.0)
        loss = jnp.mean(signs * jnp.sum(logits[:, :2], -1))
        return loss * batch["scale"][0], (updated, {})

    tx = lbopt.kfac(1e-30, layers, damping=1e-2, momentum=None)
    train_step = training.make_train_step(steep, tx, layers)
    state = training.init_state(tx, *start, RNG)
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
    model = Dead() if case == "dead" else Net()
    variables = model.init(jax.random.key(1), batch["x"])
    params = variables.pop("params")

    def loss_fn(params, model_state, batch, rng):
        logits, updated = model.apply(
            {"params": params, **model_state}, batch["x"], mutable=["batch_stats"]
        )
        return cross_entropy(logits, batch["y"]), (updated, {})

    layers = lbopt.trace_layers(loss_fn, params, variables, batch, RNG, has_aux=True)
    tx = lbopt.kfac(0.1, layers, damping=1e-8, kl_clip=1e-2)
    train_step = training.make_train_step(loss_fn, tx, layers)
    state = training.init_state(tx, params, variables, RNG)
    losses = []
    for _ in range(5):
        state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"]))
        assert all_finite((state.params, state.model_state, state.opt_state))
    assert metrics["skipped"] == 0
    assert np.all(np.isfinite(losses))
    assert losses[-1] < losses[0]
