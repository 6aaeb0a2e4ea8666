"""Inverses that have effect later: which factors they are of, and what survives."""

import functools

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lbopt
from tests.problems import Mlp, assert_close, assert_equal, classify, inputs
from tests.transforms.test_kfac import assert_natural

DAMPING, DECAY, STEPS = 1e-2, 0.8, 9
# Float64; the inverses' conditions of 1e3 leave about this.
EXACT = {"rtol": 1e-9, "atol": 1e-9}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


class Course:
    """Gradients and statistics of some batches at fixed parameters."""

    def __init__(self, seeds):
        model = Mlp(param_dtype=jnp.float64)
        first = inputs(0).astype(jnp.float64)
        self.problem = classify(model, first)
        self.layers = self.problem.trace()
        f = jax.jit(lbopt.value_grad_and_curvature(self.problem.loss_fn, self.layers))
        params, y = self.problem.params, self.problem.args[1]
        batches = {seed: inputs(seed).astype(jnp.float64) for seed in set(seeds)}
        found = {seed: f(params, x, y)[1:] for seed, x in batches.items()}
        self.given = [found[seed] for seed in seeds]

    def states(self, state=None, given=None, damping=None, **options):
        """The updates and states of the transformation, from the first state or one."""
        tx = lbopt.scale_by_kfac(
            self.layers, damping=DAMPING, factor_decay=DECAY, **options
        )
        update = jax.jit(
            lambda g, s, c, damping: tx.update(g, s, curvature=c, damping=damping)
        )
        state = tx.init(self.problem.params) if state is None else state
        results = []
        for k, (grads, curvature) in enumerate(self.given if given is None else given):
            now = DAMPING if damping is None else damping[k]
            updates, state = update(grads, state, curvature, jnp.asarray(now))
            results.append((updates, state))
        return results

    @functools.cached_property
    def averages(self):
        """The running averages after each step, by layer, in plain NumPy."""
        found, now = [], {}
        for k, (_, curvature) in enumerate(self.given, start=1):
            weight = (1 - DECAY) / (1 - DECAY**k)
            for path in self.layers:
                new = [np.asarray(x) for x in curvature[path]]
                old = now.get(path, [np.zeros_like(x) for x in new])
                now[path] = [
                    o + weight * (n - o) for o, n in zip(old, new, strict=True)
                ]
            found.append(dict(now))
        return found


@functools.cache
def changing():
    return Course(range(STEPS))


@pytest.mark.parametrize(
    ("period", "delay"), [(1, 0), (1, 1), (3, 0), (3, 1), (3, 2), (3, 3), (4, 3)]
)
def test_a_step_uses_the_factors_of_so_many_steps_ago(period, delay):
    course = changing()
    periods = lbopt.Periods(inverses=period, delay=delay)
    results = course.states(periods=periods)
    for t, (updates, state) in enumerate(results):
        # Inversions begin at 0, period, ...; the first has effect at once.
        made = max(k for k in range(0, t + 1, period) if k == 0 or k + delay <= t)
        given, averages = course.given[t][0], course.averages[made]
        assert_natural(updates, given, averages, DAMPING, **EXACT)
        ages = jax.tree.leaves(lbopt.inverse_age(state))
        assert [int(age) for age in ages] == [t - made] * len(ages)


def test_without_a_delay_nothing_is_kept_for_later():
    plain, now = (
        changing().states(periods=lbopt.Periods(inverses=2, delay=delay))
        for delay in (None, 0)
    )
    assert_equal(now, plain)
    assert plain[-1][1].pending == ()


def test_factors_that_stand_still_make_any_delay_the_same():
    course = Course([0] * 6)
    plain, *delayed = (
        course.states(periods=lbopt.Periods(inverses=2, delay=delay))
        for delay in (None, 1, 2)
    )
    for later in delayed:
        for (actual, _), (expected, _) in zip(later, plain, strict=True):
            assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("delay", [0, 2])
def test_an_inverse_that_is_not_finite_is_refused_when_it_comes(delay):
    course = changing()
    damping = [DAMPING] * STEPS
    damping[3] = np.nan
    periods = lbopt.Periods(inverses=3, delay=delay)
    results = course.states(damping=damping, periods=periods)
    states = [state for _, state in results]
    comes = 3 + delay
    assert not states[comes - 1].rejected.any()
    assert (states[comes].rejected > 0).all()
    assert states[comes].boost.tolist() == [10.0, 10.0]
    assert_equal(states[comes].inverses, states[2].inverses)
    # The next is made with ten times the damping, and is sound.
    given, found = course.given[-1][0], results[-1][0]
    assert_natural(found, given, course.averages[6], 10 * DAMPING, **EXACT)
    assert states[-1].boost.tolist() == [1.0, 1.0]


def test_sleep_while_inverses_are_under_way():
    course = changing()
    options = {"periods": lbopt.Periods(inverses=3, delay=2)}
    whole = course.states(**options)
    state = whole[3][1]
    assert (state.pending.step == 3).all()  # made at step 3, in effect at 5
    asleep = flax.serialization.to_bytes(state)
    awake = flax.serialization.from_bytes(jax.tree.map(jnp.zeros_like, state), asleep)
    after = course.states(awake, course.given[4:], **options)
    assert_equal(after, whole[4:])


def test_what_was_under_way_is_made_again_on_other_devices():
    course = changing()
    options = {"periods": lbopt.Periods(inverses=4, delay=3)}
    state = course.states(**options)[5][1]
    assert (state.pending.step == 4).all()
    placement = lbopt.Placement("data", 2)
    two = lbopt.scale_by_kfac(course.layers, placement=placement, **options)
    one = lbopt.scale_by_kfac(course.layers, **options)
    params = course.problem.params
    for tx in (two, one):
        state = lbopt.reshard(state, jax.eval_shape(tx.init, params), course.layers)
    results = course.states(state, course.given[6:8] * 4, **options)
    ages = [
        {int(age) for age in jax.tree.leaves(lbopt.inverse_age(state))}
        for _, state in results
    ]
    # Step 6 makes them anew; those of step 8 are in effect at 11.
    assert ages == [{0}, {1}, {2}, {3}, {4}, {3}, {4}, {5}]
