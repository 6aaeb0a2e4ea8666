"""``Periods`` and ``Placement``, and the numbers that optimizers refuse by name."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt
from lbopt import Periods, Placement
from tests.problems import Mlp, assert_close, classify


def check(kind, settings):
    """Past the tests' type checker, which would refuse some values in other words."""
    fields = {field.name: field.default for field in dataclasses.fields(kind)}
    made = object.__new__(kind)
    vars(made).update(fields | settings)
    made.__post_init__()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"statistics": 0}, "statistics=0 must be a whole number, ≥ 1; 1 renews them"),
        ({"statistics": None}, "statistics=None must be a whole number, ≥ 1"),
        ({"inverses": -2}, "inverses=-2 must be a whole number, ≥ 1; None leaves them"),
        ({"inverses": 2.5}, "inverses=2.5 must be a whole number, ≥ 1"),
        ({"delay": -1}, "delay=-1 must be a whole number, ≥ 0; None lets inverses"),
        ({"delay": 0.5}, "delay=0.5 must be a whole number, ≥ 0"),
        ({"delay": jnp.asarray(1)}, "delay=1 must be a Python int, because shapes"),
        ({"delay": 2}, "delay=2 must be at most inverses=1, the steps after which"),
        (
            {"inverses": 2, "delay": 3},
            "delay=3 must be at most inverses=2, .* length",
        ),
        (
            {"inverses": None, "stagger": True},
            "stagger=True must not be set with inverses=None, because",
        ),
        (
            {"inverses": None, "delay": 2},
            "delay=2 must not be set with inverses=None.* leave it out, or give a",
        ),
    ],
)
def test_periods_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        check(Periods, settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"inverses": None},
        {"inverses": None, "delay": 0},
        {"inverses": 3, "delay": 3, "stagger": True},
        {"statistics": np.int64(2), "inverses": np.int32(3), "delay": np.int32(1)},
        {"statistics": jnp.asarray(2), "inverses": jnp.asarray(3)},
    ],
)
def test_periods_in_range(settings):
    periods = Periods(**settings)
    assert all(getattr(periods, name) == value for name, value in settings.items())


def test_traced_periods_pass():
    def steps(statistics, inverses):
        periods = Periods(statistics, inverses, delay=3)
        return periods.statistics + periods.inverses

    assert jax.jit(steps)(1, 2) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"axis_size": 0}, "axis_size=0 must be a whole number, ≥ 1; pass mesh.shape"),
        ({"axis_name": "data", "axis_size": 1.0}, "axis_size=1.0 must be a whole num"),
        ({"axis_size": jnp.asarray(1)}, "axis_size=1 must be a Python int, because"),
        (
            {"axis_size": 2},
            "axis_size=2 must have axis_name, .* or leave axis_s",
        ),
        (
            {"inverses": "owner"},
            "inverses='owner' must be 'comm', 'memory' or a num",
        ),
        (
            {"inverses": -0.1},
            r"inverses=-0.1 must lie in \[0, 1\]; 'comm', 'mem",
        ),
        ({"inverses": 1.5}, r"inverses=1.5 must lie in \[0, 1\]"),
        ({"inverses": None}, r"inverses=None must be a number, in \[0, 1\]"),
        ({"inverses": float("nan")}, r"inverses=nan must lie in \[0, 1\]"),
    ],
)
def test_placements_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        check(Placement, settings)


@pytest.mark.parametrize("inverses", ["comm", "memory", 0, 0.5, 1, np.float32(0.5)])
def test_placements_in_range(inverses):
    assert Placement("data", np.int64(8), inverses).inverses == inverses


def test_settings_cannot_change_and_compare_by_value():
    assert Periods(2) == Periods(statistics=2) != Periods(3)
    assert hash(Placement("data", 2)) == hash(Placement("data", 2))
    with pytest.raises(AttributeError):
        Periods().inverses = 2


# -------------------------------------------------------------------- in optimizers


@pytest.fixture(scope="module")
def problem():
    return classify(Mlp())


@pytest.mark.parametrize(
    ("learning_rate", "settings", "message"),
    [
        (-0.1, {}, "learning_rate=-0.1 must be 0 or positive; the step is subtracted"),
        (
            "0.1",
            {},
            "learning_rate='0.1' must be a number or a schedule, 0",
        ),
        (0.1, {"damping": np.float32(-1)}, r"damping=.*-1.0\) must be positive; 1e-3"),
        (0.1, {"momentum": np.float64(1)}, r"momentum=.* must lie in \[0, 1\); None"),
        (0.1, {"weight_decay": np.nan}, "weight_decay=nan must be 0 or positive; 0"),
    ],
)
def test_kfac_refuses_numbers_by_name(problem, learning_rate, settings, message):
    # Unwrapped: the tests' type checker would refuse the string in other words.
    make = inspect.unwrap(lbopt.kfac)
    with pytest.raises(ValueError, match=message):
        make(learning_rate, problem.trace(), **settings)


def test_kfac_takes_numbers_of_numpy(problem):
    layers = problem.trace()
    _, grads, curvature = problem.evaluate(layers)
    expected, *others = (
        tx.update(grads, tx.init(problem.params), problem.params, curvature=curvature)
        for kind in (float, np.float32, np.float64)
        for tx in [
            lbopt.kfac(kind(0.1), layers, damping=kind(1e-3), momentum=kind(0.9))
        ]
    )
    for updates in others:
        assert_close(updates[0], expected[0])


@pytest.mark.parametrize("name", ["statistics", "inverses"])
def test_injected_periods_take_effect_under_jit(problem, name):
    layers = problem.trace()

    def make(period):
        return lbopt.scale_by_kfac(layers, periods=Periods(**{name: period}))

    tx = optax.inject_hyperparams(make)(period=2)
    _, grads, curvature = problem.evaluate(layers)
    update = jax.jit(lambda s: tx.update(grads, s, curvature=curvature)[1])
    state, renewed_at = tx.init(problem.params), []
    for step in range(5):
        if step == 3:
            state.hyperparams["period"] = jnp.asarray(5)
        state = update(state)
        clocks = lbopt.curvature_state(state).refresh
        steps = {"statistics": clocks.statistic_step, "inverses": clocks.inverse_step}
        renewed_at.append(int(steps[name][0]))
    assert renewed_at == [0, 0, 2, 2, 2]


@pytest.mark.parametrize(
    ("periods", "expected"),
    [
        (Periods(), [(True, True)] * 3),
        (Periods(2, 3), [(True, True), (False, False), (True, False)]),
        (Periods(1, None), [(True, True), (True, False), (True, False)]),
        # Only flags know whose turn it is, and what waits to be delivered.
        (Periods(2, 3, stagger=True), [(True, None), (False, None), (True, None)]),
        (Periods(1, 3, delay=1), [(True, None)] * 3),
        (
            Periods(np.int64(2), np.int32(2)),
            [(True, True), (False, False), (True, True)],
        ),
    ],
)
def test_the_number_of_a_step_says_what_is_due(periods, expected):
    assert [periods.due(step) for step in range(3)] == expected


def test_periods_that_are_arrays_are_left_to_flags():
    assert Periods(jnp.asarray(2), 3).due(1) == (None, False)


def test_a_loop_of_ones_own_renews_what_is_due(problem):
    layers = problem.trace()
    periods = Periods(2, 4)
    tx = lbopt.scale_by_kfac(layers, periods=periods)
    f = lbopt.value_grad_and_curvature(problem.loss_fn, layers)

    @functools.partial(jax.jit, static_argnames="due")
    def step(state, due):
        _, grads, curvature = f(
            problem.params, *problem.args, due=lbopt.refresh(state, due)
        )
        return tx.update(grads, state, curvature=curvature, due=due)

    by_schedule, by_flags = (tx.init(problem.params) for _ in range(2))
    for number in range(5):
        updates, by_schedule = step(by_schedule, periods.due(number))
        expected, by_flags = step(by_flags, lbopt.Due())
        assert_close(updates, expected, rtol=1e-4)
    clocks, others = by_schedule.refresh, by_flags.refresh
    assert clocks.statistic_step.tolist() == others.statistic_step.tolist()
    assert clocks.inverse_step.tolist() == others.inverse_step.tolist()


@pytest.mark.parametrize("due", [True, (True, False), lbopt.Due(1, 0)])
def test_what_is_no_due_is_refused(problem, due):
    tx = inspect.unwrap(lbopt.scale_by_kfac)(problem.trace())
    state, grads = tx.init(problem.params), problem.params
    with pytest.raises(ValueError, match=r"due=.* must be an lbopt.Due of flags"):
        inspect.unwrap(tx.update)(grads, state, curvature={}, due=due)


@pytest.mark.parametrize(
    "options",
    [{"stale_threshold": 0.1, "factor_decay": 0.0}, {"eigenvalues": "corrected"}],
)
def test_flags_alone_decide_where_the_host_cannot_know(problem, options):
    tx = lbopt.scale_by_kfac(problem.trace(), **options)
    state, grads = tx.init(problem.params), problem.params
    with pytest.raises(ValueError, match=r"due=Due.* must be left out with stale_thr"):
        tx.update(grads, state, curvature={}, due=lbopt.Due(True, True))
