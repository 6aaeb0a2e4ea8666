"""The clocks, and the mask that is read off a state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt
from lbopt.curvature import refresh as clocks
from tests.curvature.test_capture import Lifted
from tests.oracles import quick_jit
from tests.problems import Mlp, all_finite, assert_equal, classify


def test_is_due_counts_from_zero():
    due = [bool(clocks.is_due(jnp.asarray(count), 3)) for count in range(7)]
    assert due == [True, False, False, True, False, False, True]


def test_everything_is_due_at_first():
    clock = clocks.init_refresh(3, 2)
    assert clock.due.tolist() == [True] * 3
    assert clock.statistic_step.tolist() == [-1] * 3
    assert clock.inverse_step.tolist() == [-1] * 2


def chains(layers):
    inner = lbopt.scale_by_kfac(layers, periods=lbopt.Periods(2))
    return {
        "bare": inner,
        "chain": optax.chain(optax.identity(), inner, optax.trace(0.9)),
        "clip": lbopt.clip_by_kl(inner, 1.0, 0.1),
        "finite": optax.apply_if_finite(inner, 3),
        "steps": optax.MultiSteps(inner, 2),
        "masked": optax.masked(inner, {"first": True, "last": True}),
    }


@pytest.mark.parametrize("name", ["bare", "chain", "clip", "finite", "steps", "masked"])
def test_the_mask_is_found_in_any_chain(name):
    problem = classify(Mlp())
    layers = problem.trace()
    state = chains(layers)[name].init(problem.params)
    mask = lbopt.refresh(state)
    assert set(mask) == {"first", "last"}
    assert all(bool(flag) for flag in jax.tree.leaves(mask))


def test_two_curvature_transforms_share_the_mask():
    problem = classify(Mlp())
    layers = problem.trace()
    tx = optax.partition(
        {"often": lbopt.scale_by_kfac(layers), "rarely": lbopt.scale_by_kfac(layers)},
        {"first": "often", "last": "rarely"},
    )
    assert set(lbopt.refresh(tx.init(problem.params))) == {"first", "last"}


def test_the_age_is_that_of_the_oldest_copy():
    problem = classify(Lifted("scan"))
    state = lbopt.scale_by_kfac(problem.trace()).init(problem.params)
    assert {int(age) for age in jax.tree.leaves(lbopt.inverse_age(state))} == {0}
    # Three copies of two factors in the body, and two factors of the head.
    steps = state.refresh._replace(inverse_step=jnp.asarray([4, 2, 3, 5, 5, 1, 6, 0]))
    ages = lbopt.inverse_age(state._replace(count=jnp.asarray(8), refresh=steps))
    assert {path: tuple(map(int, age)) for path, age in ages.items()} == {
        "body/dense": (5, 6),
        "head": (1, 7),
    }


def test_a_state_without_curvature():
    state = optax.sgd(0.1, momentum=0.9).init({"w": jnp.ones(2)})
    message = r"opt_state=tuple holds no curvature transform.*leave out due="
    with pytest.raises(ValueError, match=message):
        lbopt.refresh(state)


# ------------------------------------------------------------------ SP-NGD's rule


@pytest.mark.parametrize(
    ("similar", "before", "last", "previous", "expected"),
    [
        (False, False, 5, 3, 2),  # halved, rounded down
        (False, True, 5, 3, 2),
        (False, False, 1, 1, 1),  # not below 1
        (True, False, 5, 3, 5),
        (True, True, 5, 3, 8),
        (True, True, 1, 1, 2),
        # After a halving of d = 8 to 4: 3 d / 2, or d / 2.
        (True, True, 4, 8, 12),
        (True, False, 4, 8, 4),
    ],
)
def test_the_next_interval(similar, before, last, previous, expected):
    flags = jnp.asarray([similar]), jnp.asarray([before])
    intervals = jnp.asarray([last]), jnp.asarray([previous])
    assert clocks.next_interval(*flags, *intervals).tolist() == [expected]


def adaptive(alpha, **settings):
    """A problem, the optimizer, and its compiled update."""
    problem = classify(Mlp())
    layers = problem.trace()
    tx = lbopt.scale_by_kfac(
        layers, factor_decay=0.0, stale_threshold=alpha, **settings
    )
    _, grads, curvature = problem.evaluate(layers)
    update = quick_jit(lambda s, c: tx.update(grads, s, curvature=c))
    return tx.init(problem.params), curvature, update


def masked(curvature, due):
    """Statistics that are not due are NaN, so that reading them shows."""
    leaves, tree = jax.tree.flatten(curvature)
    return tree.unflatten(
        [
            x if d else jnp.full_like(x, jnp.nan)
            for x, d in zip(leaves, due, strict=True)
        ]
    )


def test_statistics_that_stay_the_same_are_renewed_at_fibonacci_steps():
    state, curvature, update = adaptive(0.1)
    times = []
    for t in range(1, 23):
        due = state.refresh.due.tolist()
        assert len(set(due)) == 1
        times += [t] * due[0]
        before = state
        updates, state = update(state, masked(curvature, due))
        assert all_finite((updates, state))
        assert state.rejected.tolist() == [0, 0]
        if not due[0]:
            assert_equal(state.factors, before.factors)
            assert_equal(state.inverses, before.inverses)
        assert state.refresh.statistic_step.tolist() == [times[-1] - 1] * 4
        assert state.refresh.inverse_step.tolist() == [times[-1] - 1] * 4
    assert times == [1, 2, 3, 5, 8, 13, 21]


def test_a_refused_statistic_stays_due():
    state, curvature, update = adaptive(0.1)
    g = jnp.full_like(curvature["last"].g, jnp.nan)
    broken = {**curvature, "last": curvature["last"]._replace(g=g)}
    times = [[] for _ in range(4)]
    for t in range(1, 15):
        for own, due in zip(times, state.refresh.due.tolist(), strict=True):
            own += [t] * due
        factor = state.factors["last"].g
        updates, state = update(state, broken if t in (2, 3, 7) else curvature)
        assert all_finite((updates, state))
        if t in (2, 3, 7):
            assert_equal(state.factors["last"].g, factor)
    assert times[:3] == [[1, 2, 3, 5, 8, 13]] * 3
    # Accepted at 1, 4, 5 and 8: intervals 1, 1, 2, 3; the one at 7 was refused.
    assert times[3] == [1, 2, 3, 4, 5, 7, 8, 11]
    assert state.rejected.tolist() == [0, 3]


def frobenius_similar(x, y, alpha):
    norm = np.linalg.norm
    return y is not None and norm(x - y) < alpha * norm(y)


def algorithm_1(statistics, alpha):
    """The steps at which one statistic is renewed, and the margin of its decisions."""
    due, last, before, interval, previous = 1, None, None, 1, 1
    times, margin = [], np.inf
    for t, x in enumerate(statistics, start=1):
        if t != due:
            continue
        times.append(t)
        for y in (last, before):
            if y is not None:
                ratio = np.linalg.norm(x - y) / np.linalg.norm(y)
                margin = min(margin, abs(ratio / alpha - 1))
        if not frobenius_similar(x, last, alpha):
            new = max(1, interval // 2)
        elif not frobenius_similar(x, before, alpha):
            new = interval
        else:
            new = interval + previous
        interval, previous = new, interval
        due, last, before = t + new, x, last
    return times, margin


def test_clocks_follow_algorithm_1():
    alpha, steps = 0.1, 40
    state, curvature, update = adaptive(alpha)
    leaves, tree = jax.tree.flatten(curvature)
    rng = np.random.default_rng(0)
    series = []
    for x in leaves:
        # Noise that comes and goes, around a slow drift.
        noise = rng.normal(size=(steps, *x.shape))
        noise = noise @ np.swapaxes(noise, -1, -2)
        noise /= np.linalg.norm(noise, axis=(1, 2), keepdims=True)
        size = np.where(rng.random(steps) < 0.15, 0.4, 0.02)[:, None, None]
        drift = np.linspace(1, 1.3, steps)[:, None, None]
        norm = np.linalg.norm(x)
        series.append(drift * np.asarray(x)[None] + size * norm * noise)
    times = [[] for _ in leaves]
    for t in range(1, steps + 1):
        due = state.refresh.due.tolist()
        for own, flag in zip(times, due, strict=True):
            own += [t] * flag
        new = tree.unflatten([jnp.asarray(x[t - 1], jnp.float32) for x in series])
        _, state = update(state, masked(new, due))
    expected = [algorithm_1(x, alpha) for x in series]
    assert min(margin for _, margin in expected) > 1e-4  # no case of rounding
    assert times == [own for own, _ in expected]
    assert len({tuple(own) for own in times}) > 1  # each its own clock
