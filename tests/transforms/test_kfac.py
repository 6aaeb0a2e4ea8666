"""``scale_by_kfac`` step by step, against plain NumPy and against bad numbers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt
from tests.problems import (
    BATCH,
    CLASSES,
    FEATURES,
    Mlp,
    all_finite,
    assert_close,
    assert_equal,
    classify,
    inputs,
)

DAMPING, DECAY = 1e-2, 0.8


def steps_of(problem, layers, tx, batches):
    """The states after each batch, and the last updates; parameters stay."""
    f = jax.jit(lbopt.value_grad_and_curvature(problem.loss_fn, layers))
    update = jax.jit(lambda g, s, c: tx.update(g, s, problem.params, curvature=c))
    state, states, given = tx.init(problem.params), [], []
    for x in batches:
        _, grads, curvature = f(problem.params, x, problem.args[1])
        updates, state = update(grads, state, curvature)
        states.append(state)
        given.append((grads, curvature, updates))
    return states, given


def numpy_natural(grads, a, g, damping):
    """(A + π√λ I)⁻¹ ∇W (G + √λ/π I)⁻¹ from the definition, in float64."""
    a, g = np.asarray(a, np.float64), np.asarray(g, np.float64)
    w = np.asarray(grads["kernel"], np.float64)
    if "bias" in grads:
        w = np.concatenate([w, np.asarray(grads["bias"], np.float64)[None]])
    pi = np.sqrt((np.trace(a) / len(a)) / (np.trace(g) / len(g)))
    left = a + pi * np.sqrt(damping) * np.eye(len(a))
    right = g + np.sqrt(damping) / pi * np.eye(len(g))
    u = np.linalg.solve(left, w) @ np.linalg.inv(right)
    return {"kernel": u[:-1], "bias": u[-1]} if "bias" in grads else {"kernel": u}


def assert_natural(updates, grads, factors, damping, **tolerance):
    """Each layer's update is the natural gradient by its factors A and G."""
    for path, (a, g) in factors.items():
        expected = numpy_natural(grads[path], a, g, damping)
        actual = {name: updates[path][name] for name in expected}
        assert_close(actual, expected, **tolerance)


@pytest.fixture(scope="module")
def mlp():
    problem = classify(Mlp())
    return problem, problem.trace()


def test_updates_follow_the_definition(mlp):
    problem, layers = mlp
    tx = lbopt.scale_by_kfac(layers, damping=DAMPING, factor_decay=DECAY)
    _, given = steps_of(problem, layers, tx, [inputs(i) for i in range(3)])
    averages = {}
    for k, (grads, curvature, updates) in enumerate(given, start=1):
        weight = (1 - DECAY) / (1 - DECAY**k)
        for path in layers:
            new = [np.asarray(x, np.float64) for x in curvature[path]]
            old = averages.get(path, [0.0, 0.0])
            averages[path] = [
                o + weight * (n - o) for o, n in zip(old, new, strict=True)
            ]
        assert_natural(updates, grads, averages, DAMPING, rtol=1e-4, atol=1e-5)


def test_a_damping_schedule_is_asked_for_the_step(mlp):
    problem, layers = mlp
    schedule = optax.piecewise_constant_schedule(DAMPING, {1: 10.0})
    tx = lbopt.scale_by_kfac(layers, damping=schedule, factor_decay=0.0)
    _, given = steps_of(problem, layers, tx, [inputs(0), inputs(1)])
    for damping, (grads, curvature, updates) in zip(
        (DAMPING, 10 * DAMPING), given, strict=True
    ):
        assert_natural(updates, grads, curvature, damping, rtol=1e-4, atol=1e-5)


def test_periods(mlp):
    problem, layers = mlp
    tx = lbopt.scale_by_kfac(layers, periods=lbopt.Periods(2, 3))
    states, _ = steps_of(problem, layers, tx, [inputs(i) for i in range(7)])
    # Statistics at 0, 2, 4, 6; inverses at 0, 3, 6; due is that of the coming step.
    assert [bool(s.refresh.due.all()) for s in states] == [False, True] * 3 + [False]
    assert [int(s.refresh.renewals[0]) for s in states] == [1, 1, 2, 2, 3, 3, 4]
    assert [int(s.refresh.statistic_step[0]) for s in states] == [0, 0, 2, 2, 4, 4, 6]
    assert [int(s.refresh.inverse_step[0]) for s in states] == [0, 0, 0, 3, 3, 3, 6]
    assert [int(s.count) for s in states] == [1, 2, 3, 4, 5, 6, 7]
    assert_equal(states[0].factors, states[1].factors)
    assert_equal(states[0].inverses, states[2].inverses)


def test_layers_are_numbered_alphabetically_jitted_or_not():
    # JAX sorts dictionaries; parameters may come in another order.
    problem = classify(Mlp())
    backwards = dict(reversed(problem.params.items()))
    problem = problem._replace(params=backwards)
    layers = problem.trace()
    assert list(layers) == ["last", "first"]
    _, grads, curvature = problem.evaluate(layers)
    broken = {
        **curvature,
        "last": curvature["last"]._replace(a=curvature["last"].a * jnp.nan),
    }
    tx = lbopt.scale_by_kfac(layers)
    eager = tx.update(grads, tx.init(problem.params), curvature=broken)
    jitted = jax.jit(lambda s: tx.update(grads, s, curvature=broken))(
        tx.init(problem.params)
    )
    for updates, state in (eager, jitted):
        assert state.rejected.tolist() == [0, 1]
        assert state.refresh.renewals.tolist() == [1, 1, 0, 1]  # a, g of first, last
        assert_close(updates["first"], eager[0]["first"], rtol=1e-4)
        # Until its first statistic a layer's gradient passes unchanged.
        assert_equal(updates["last"], grads["last"])
        assert {p: bool(m.a) for p, m in lbopt.refresh(state).items()} == {
            "first": True,
            "last": True,
        }


# ------------------------------------------------------------------- bad numbers


class Relu(nn.Module):
    """A hidden layer that a strongly negative bias kills."""

    bias: float = 0.0

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4, bias_init=nn.initializers.constant(self.bias), name="first")(x)
        return nn.Dense(CLASSES, name="last")(nn.relu(x))


@pytest.mark.parametrize("case", ["duplicated", "zero", "dead"])
def test_singular_factors_keep_everything_finite(case):
    x = {
        "duplicated": jnp.tile(inputs()[:, :1], (1, FEATURES)),
        "zero": jnp.zeros((BATCH, FEATURES)),
        "dead": inputs(),
    }[case]
    problem = classify(Relu(-100.0 if case == "dead" else 0.0), x)
    layers = problem.trace()
    tx = lbopt.scale_by_kfac(layers, damping=1e-10)
    states, given = steps_of(problem, layers, tx, [x] * 3)
    for state, (_, _, updates) in zip(states, given, strict=True):
        assert all_finite((state, updates))
    if case == "dead":  # no gradient reaches the first layer
        assert not np.any(given[-1][2]["first"]["kernel"])


def test_a_failed_inverse_keeps_the_last_good_one_and_damps_more(mlp):
    # Factors far from positive definite, as no finite statistic should be: only more
    # damping inverts them.
    problem, layers = mlp
    tx = lbopt.scale_by_kfac(layers, damping=1e-2, factor_decay=0.0)
    _, grads, good = problem.evaluate(layers)
    update = jax.jit(lambda s, c: tx.update(grads, s, curvature=c)[1])
    state = update(tx.init(problem.params), good)
    assert state.boost.tolist() == [1.0, 1.0]
    first = good["first"]
    shifted = first._replace(a=first.a - 2.0 * jnp.eye(FEATURES + 1))
    bad = {**good, "first": shifted}
    inverses = state.inverses["first"]
    boosts = []
    for _ in range(2):
        state = update(state, bad)
        boosts.append(state.boost.tolist())
        assert_equal(state.inverses["first"].a_inv, inverses.a_inv)
        assert state.refresh.inverse_step.tolist()[0] == 0
    assert boosts == [[10.0, 1.0], [100.0, 1.0]]
    assert state.rejected.tolist() == [2, 0]
    for _ in range(8):
        state = update(state, bad)
        if state.boost[0] == 1:
            break
    assert state.boost.tolist() == [1.0, 1.0]  # one succeeded with the last boost
    assert state.rejected.tolist()[0] == state.count - 2
    assert state.refresh.inverse_step[0] == state.count - 1
    assert not np.array_equal(state.inverses["first"].a_inv, inverses.a_inv)
    assert all_finite(state)


@pytest.mark.parametrize("number", [jnp.nan, jnp.inf, -jnp.inf])
def test_a_statistic_that_is_not_finite_is_refused_by_layer(mlp, number):
    problem, layers = mlp
    tx = lbopt.scale_by_kfac(layers, periods=lbopt.Periods(3))
    _, grads, good = problem.evaluate(layers)
    update = jax.jit(lambda s, c: tx.update(grads, s, curvature=c))
    g = good["last"].g.at[0, 0].set(number)
    bad = {**good, "last": good["last"]._replace(g=g)}
    # At the first step: the layer has no inverse yet, and asks again at once.
    updates, state = update(tx.init(problem.params), bad)
    assert all_finite((updates, state))
    assert state.rejected.tolist() == [0, 1]
    assert state.refresh.due.tolist() == [False, False, False, True]
    assert_equal(updates["last"], grads["last"])
    _, state = update(state, good)
    assert state.refresh.inverse_step.tolist() == [1, 1, 1, 1]
    # Later: the old average stays.
    before = state.factors
    _, state = update(state, good)
    updates, state = update(state, bad)
    assert state.rejected.tolist() == [0, 2]
    assert_equal(state.factors["last"].g, before["last"].g)
    assert all_finite((updates, state))


def test_a_step_without_statistics_does_not_read_them(mlp):
    problem, layers = mlp
    tx = lbopt.scale_by_kfac(layers, periods=lbopt.Periods(5))
    _, grads, good = problem.evaluate(layers)
    _, state = tx.update(grads, tx.init(problem.params), curvature=good)
    bad = jax.tree.map(lambda x: x * jnp.nan, good)
    _, after = tx.update(grads, state, curvature=bad)
    assert_equal(after.factors, state.factors)
    assert after.rejected.tolist() == [0, 0]
