"""Inverses that have effect later: which factors they are of, and what survives."""

import functools

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt
from tests.oracles import quick_jit
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
    options = {"periods": lbopt.Periods(inverses=3, delay=delay)}
    sound = course.states(given=course.given[:4], **options)
    # Averages far from positive definite at step 3 alone.
    broken = jax.tree.map(lambda x: -1e3 * x, sound[2][1].factors)
    start = sound[2][1]._replace(factors=broken)
    results = sound[:3] + course.states(start, course.given[3:4], **options)
    start = results[3][1]._replace(factors=sound[3][1].factors)
    results += course.states(start, course.given[4:], **options)
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


@pytest.mark.parametrize("bad", [np.nan, np.inf, -DAMPING, 0.0])
def test_a_damping_that_is_none_leaves_the_last_one_in_effect(bad):
    course = changing()
    given = course.given[:5]
    damping = [DAMPING, 3 * DAMPING, bad, bad, 2 * DAMPING]
    results = course.states(given=given, damping=damping)
    kept = [DAMPING, 3 * DAMPING, 3 * DAMPING, 3 * DAMPING, 2 * DAMPING]
    for t, (updates, state) in enumerate(results):
        assert_natural(updates, given[t][0], course.averages[t], kept[t], **EXACT)
        assert state.last_damping == kept[t]
        assert state.rejected.tolist() == [max(0, min(t - 1, 2))] * 2


@pytest.mark.parametrize("weight_decay", [0.0, 5 * DAMPING])
def test_a_schedule_that_falls_below_zero_stays_at_its_last_damping(weight_decay):
    course = changing()
    schedule = optax.linear_schedule(DAMPING, -DAMPING, transition_steps=3)
    params, layers = course.problem.params, course.layers
    tx = lbopt.kfac(1.0, layers, damping=schedule, weight_decay=weight_decay)
    state = tx.init(params)
    update = jax.jit(lambda g, s, c: tx.update(g, s, params, curvature=c)[1])
    found = []
    for grads, curvature in course.given[:4]:
        state = update(grads, state, curvature)
        own = lbopt.curvature_state(state)
        found.append((float(own.last_damping), own.rejected.tolist()))
    positive = [DAMPING + weight_decay, DAMPING / 3 + weight_decay]
    np.testing.assert_allclose([x for x, _ in found[:2]], positive, rtol=1e-6)
    assert found[2:] == [(found[1][0], [1, 1]), (found[1][0], [2, 2])]


def test_a_damping_out_of_range_is_refused_where_it_is_known():
    course = changing()
    with pytest.raises(ValueError, match=r"damping\(0\)=.* must be positive; 1e-3 is"):
        lbopt.scale_by_kfac(course.layers, damping=lambda step: -1.0 * step)
    tx = lbopt.scale_by_kfac(course.layers)
    state, (grads, curvature) = tx.init(course.problem.params), course.given[0]
    for bad in (-1.0, None, "1e-3", jnp.asarray(jnp.nan)):
        with pytest.raises(ValueError, match=r"damping=.*; leave it out of update"):
            tx.update(grads, state, curvature=curvature, damping=bad)


class Normed(nn.Module):
    """A dense layer and a norm layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="norm", param_dtype=jnp.float64)(x)
        return nn.Dense(3, name="dense", param_dtype=jnp.float64)(x)


def test_norm_layers_are_damped_by_their_multiple():
    problem = classify(Normed(), inputs(0).astype(jnp.float64))
    layers = problem.trace()
    assert [layers[path].block.kind for path in layers] == ["unit_wise", "kronecker"]
    tx = lbopt.scale_by_kfac(layers, damping=DAMPING, norm_damping=16.0)
    _, grads, curvature = problem.evaluate(layers)
    state = tx.init(problem.params)
    update = quick_jit(lambda g, s, c: tx.update(g, s, curvature=c)[0])
    updates = update(grads, state, curvature)
    blocks = np.asarray(curvature["norm"].f)  # of scale and bias of each channel
    g = np.stack([grads["norm"][name] for name in ("scale", "bias")], -1)
    natural = np.linalg.solve(blocks + 16 * DAMPING * np.eye(2), g[..., None])[..., 0]
    found = np.stack([updates["norm"][name] for name in ("scale", "bias")], -1)
    np.testing.assert_allclose(found, natural, rtol=1e-9)
    dense = {"dense": (curvature["dense"].a, curvature["dense"].g)}
    assert_natural({"dense": updates["dense"]}, grads, dense, DAMPING, **EXACT)


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
