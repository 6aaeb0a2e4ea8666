"""EKFAC step by step: against a textbook loop, against bad numbers, and in training."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt
from lbopt.curvature.eigen_moments import CorrectedDue
from tests.oracles import quick_jit
from tests.problems import (
    BATCH,
    CLASSES,
    Mlp,
    all_finite,
    assert_close,
    assert_equal,
    assert_near_largest,
    classify,
    inputs,
)

DAMPING, DECAY, PERIOD = 1e-2, 0.8, 3
EXACT = 1e-9  # relative, of float64 after steps with conditions up to 1e3


class Setting(NamedTuple):
    """A problem, its layers and an optimizer."""

    problem: object
    layers: object
    tx: optax.GradientTransformationExtraArgs

    def step(self):
        """``(state, x) -> (gradients, curvature, updates, state)``."""
        f = lbopt.value_grad_and_curvature(self.problem.loss_fn, self.layers)
        params, labels = self.problem.params, self.problem.args[1]

        def step(state, x):
            _, grads, curvature = f(params, x, labels, due=lbopt.refresh(state))
            updates, state = self.tx.update(grads, state, curvature=curvature)
            return grads, curvature, updates, state

        return quick_jit(step)

    def update(self, grads, state, curvature):
        update = quick_jit(lambda g, s, c: self.tx.update(g, s, curvature=c))
        return update(grads, state, curvature)

    def init(self):
        return self.tx.init(self.problem.params)


def setting_of(dtype=jnp.float32, **options):
    problem = classify(Mlp(param_dtype=dtype), inputs().astype(dtype))
    layers = problem.trace()
    options = {"damping": DAMPING, "factor_decay": DECAY} | options
    tx = lbopt.scale_by_kfac(layers, eigenvalues="corrected", **options)
    return Setting(problem, layers, tx)


# ------------------------------------------------------------------ the textbook


def rows_of(params, x, labels):
    """Inputs and output gradients of both layers, each example's own loss."""
    first, last = params["first"], params["last"]
    a0 = np.c_[x, np.ones(len(x))]
    hidden = np.tanh(a0 @ np.vstack([first["kernel"], first["bias"]]))
    f = hidden @ last["kernel"]
    p = np.exp(f) / np.exp(f).sum(1, keepdims=True)
    g1 = p - np.eye(CLASSES)[labels]
    g0 = (g1 @ np.asarray(last["kernel"]).T) * (1 - hidden**2)
    return {"first": (a0, g0), "last": (hidden, g1)}


def averaged(old, new, k):
    return old + (1 - DECAY) / (1 - DECAY**k) * (new - old)


@pytest.mark.parametrize("stats_period", [1, 2])
def test_a_run_follows_the_textbook(stats_period):
    with jax.enable_x64(True):
        follow(
            setting_of(jnp.float64, periods=lbopt.Periods(stats_period, PERIOD)),
            stats_period,
        )


def follow(setting, stats_period, steps=8):
    params = jax.tree.map(np.asarray, setting.problem.params)
    labels = np.asarray(setting.problem.args[1])
    step, state = setting.step(), setting.init()
    factors, bases, moments, renewals, seen = {}, {}, {}, 0, 0
    for t in range(steps):
        x = np.asarray(inputs(t), np.float64)
        rows = rows_of(params, x, labels)
        grads, _, updates, state = step(state, jnp.asarray(x))
        due = t % stats_period == 0
        # After the first step the eigenvalues have had no statistic yet.
        squares_due = t > 0 and (due or not seen)
        renewals, seen = renewals + due, seen + squares_due
        for path, (a, g) in rows.items():
            if due:
                new = [a.T @ a / BATCH, g.T @ g / BATCH]
                old = factors.get(path, [0.0, 0.0])
                factors[path] = [
                    averaged(o, n, renewals) for o, n in zip(old, new, strict=True)
                ]
            if squares_due:
                u, v = bases[path]
                squares = ((a @ u)[:, :, None] * (g @ v)[:, None]) ** 2
                moments[path] = averaged(moments[path], squares.mean(0), seen)
            if t % PERIOD == 0:
                (d_a, u), (d_g, v) = (np.linalg.eigh(m) for m in factors[path])
                if t == 0:
                    moments[path] = np.outer(d_a, d_g)
                else:
                    basis, before = np.kron(u, v), np.kron(*bases[path])
                    whole = before @ np.diag(moments[path].ravel()) @ before.T
                    inside = np.diag(basis.T @ whole @ basis)
                    moments[path] = inside.reshape(moments[path].shape)
                bases[path] = u, v
            u, v = bases[path]
            arrays = [np.atleast_2d(x) for x in (grads[path]["kernel"],)]
            arrays += [grads[path]["bias"][None]] if "bias" in grads[path] else []
            w = np.concatenate(arrays)
            natural = u @ ((u.T @ w @ v) / (moments[path] + DAMPING)) @ v.T
            found = [updates[path]["kernel"]]
            found += [updates[path]["bias"][None]] if "bias" in grads[path] else []
            difference = np.concatenate(found) - natural
            assert np.linalg.norm(difference) < EXACT * np.linalg.norm(natural)
    assert seen > 2


def test_the_mask_has_the_bases_in_effect():
    setting = setting_of()
    state = setting.init()
    due = lbopt.refresh(state)
    assert isinstance(due["first"], CorrectedDue)
    assert bool(due["first"].a)
    assert not bool(due["first"].s)  # in which bases?
    step = setting.step()
    for _ in range(2):
        _, curvature, _, state = step(state, inputs())
    due = lbopt.refresh(state)["first"]
    assert bool(due.s)
    assert_equal(due.a_basis, state.inverses["first"].a.vectors)
    # The trace is that of the Fisher matrix, in any basis.
    np.testing.assert_allclose(
        curvature["first"].s.sum(), state.moments["first"].s.sum(), rtol=1e-5
    )


def test_until_there_are_bases_gradients_pass():
    setting = setting_of()
    state = setting.init()
    _, grads, curvature = setting.problem.evaluate(
        setting.layers, due=lbopt.refresh(state)
    )
    bad = jax.tree.map(lambda x: x * jnp.nan, curvature)
    updates, after = setting.update(grads, state, bad)
    assert_equal(updates, grads)
    assert_equal(after.moments, state.moments)


def test_the_order_of_the_examples_does_not_matter():
    # More inputs and units than examples: both factors have null spaces, whose
    # eigenvectors follow the rounding, and so the order in which examples are summed.
    x = inputs(features=3 * BATCH)
    problem = classify(Mlp(width=2 * BATCH), x)
    layers = problem.trace()
    tx = lbopt.scale_by_kfac(
        layers, damping=DAMPING, eigenvalues="corrected", periods=lbopt.Periods(1, 2)
    )
    f = lbopt.value_grad_and_curvature(problem.loss_fn, layers)

    @quick_jit
    def step(params, state, x, y):
        _, grads, curvature = f(params, x, y, due=lbopt.refresh(state))
        updates, state = tx.update(grads, state, curvature=curvature)
        return jax.tree.map(lambda p, u: p - 0.1 * u, params, updates), state

    def after(order):
        params, state = problem.params, tx.init(problem.params)
        for seed in range(5):
            x = inputs(seed, features=3 * BATCH)[order]
            params, state = step(params, state, x, problem.args[1][order])
        return params

    here, there = after(jnp.arange(BATCH)), after(jnp.arange(BATCH)[::-1])
    assert_near_largest(there, here, 1e-3)


# ------------------------------------------------------------------ bad numbers


@pytest.fixture(scope="module")
def warm():
    """A setting, its step, and the state and results after three steps."""
    setting = setting_of(periods=lbopt.Periods(inverses=5))
    step, state = setting.step(), setting.init()
    for i in range(3):
        grads, curvature, _, state = step(state, inputs(i))
    return setting, step, state, grads, curvature


@pytest.mark.parametrize("number", [jnp.nan, jnp.inf])
def test_moments_that_are_not_finite_are_refused_by_layer(warm, number):
    setting, _, state, grads, curvature = warm
    s = curvature["first"].s.at[0, 0].set(number)
    bad = curvature | {"first": curvature["first"]._replace(s=s)}
    updates, after = setting.update(grads, state, bad)
    assert all_finite((updates, after))
    assert_equal(after.moments["first"].s, state.moments["first"].s)
    assert (after.moments["last"].s != state.moments["last"].s).any()
    rejected = (after.rejected - state.rejected).tolist()
    assert rejected == [1, 0]
    assert [int(after.moments[p].renewals) for p in ("first", "last")] == [2, 3]


def test_a_basis_that_is_refused_changes_nothing(warm):
    setting, _, state, grads, curvature = warm
    state = state._replace(count=jnp.asarray(5))  # its turn
    sound = setting.update(grads, state, curvature)[1]
    assert (
        sound.inverses["first"].a.vectors != state.inverses["first"].a.vectors
    ).any()
    # An average too large for an eigendecomposition, but finite.
    factors = jax.tree.map(lambda x: x.at[:].set(3e38), state.factors)
    state = state._replace(factors=factors)
    updates, after = setting.update(grads, state, curvature)
    assert_equal(after.inverses, state.inverses)
    averaged = sound.moments["first"].s.sum()
    np.testing.assert_allclose(after.moments["first"].s.sum(), averaged, rtol=1e-5)
    assert (after.rejected > state.rejected).all()
    assert all_finite(updates)


# ------------------------------------------------------------------ what does not fit


def test_inversion_in_the_background_would_leave_them_behind(warm):
    setting, _, state, _, _ = warm
    message = (
        r"eigenvalues='corrected' must not be used with .* in the step, with Periods"
    )
    with (
        lbopt.BackgroundInversion(setting.layers) as exchange,
        pytest.raises(ValueError, match=message),
    ):
        exchange(state)


# ------------------------------------------------------------------ beside others


class Mixed(nn.Module):
    """An embedding and a norm layer, which keep what they have, and two dense ones."""

    @nn.compact
    def __call__(self, words):
        x = nn.Embed(7, 4, name="embed")(words).mean(1)
        x = nn.LayerNorm(name="norm")(nn.Dense(5, name="dense")(x))
        return nn.Dense(CLASSES, name="top")(nn.tanh(x))


def test_other_blocks_keep_what_they_have():
    words = jax.random.randint(jax.random.key(0), (BATCH, 4), 0, 7)
    problem = classify(Mixed(), words)
    layers = problem.trace()
    own, plain = (
        lbopt.scale_by_kfac(layers, damping=DAMPING, eigenvalues=kind)
        for kind in ("corrected", "kronecker")
    )
    state, before = own.init(problem.params), plain.init(problem.params)
    assert set(state.moments) == {"dense", "top"}
    f = lbopt.value_grad_and_curvature(problem.loss_fn, layers)

    @quick_jit
    def step(state, before):
        _, grads, curvature = f(problem.params, *problem.args, due=lbopt.refresh(state))
        updates, state = own.update(grads, state, curvature=curvature)
        _, _, curvature = f(problem.params, *problem.args)
        expected, before = plain.update(grads, before, curvature=curvature)
        return updates, state, expected, before

    for _ in range(2):
        updates, state, expected, before = step(state, before)
        for path in ("embed", "norm"):
            assert_close(updates[path], expected[path])
        assert (
            np.abs(updates["dense"]["kernel"] - expected["dense"]["kernel"]).max() > 0
        )
    # Second moments are of no device's own, and are counted with what is no factor.
    assert state.report.statistics.tolist() == [3, 3, 3]


def test_a_state_goes_on_with_other_devices():
    setting = setting_of()
    step, state = setting.step(), setting.init()
    for i in range(2):
        state = step(state, inputs(i))[-1]
    many = lbopt.scale_by_kfac(
        setting.layers,
        eigenvalues="corrected",
        placement=lbopt.Placement("data", 4),
    )
    like = jax.eval_shape(many.init, setting.problem.params)
    moved = lbopt.reshard(state, like, setting.layers)
    assert_equal(moved.moments, state.moments)
    assert_equal(lbopt.reshard(moved, state, setting.layers), state)
