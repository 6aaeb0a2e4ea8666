"""Programs by schedule: the numbers that flags in the state give, and which program."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt
from lbopt import training
from lbopt.scheduled_step import ScheduledStep
from tests import problems
from tests.devices import mesh_of, spread
from tests.problems import assert_close, assert_equal, batch_of

RNG = jax.random.key(5)
loss_fn, *START, LAYERS = problems.norm_net()
PERIODS = lbopt.Periods(2, 4)
NOTHING, STATISTICS, ALL = (
    lbopt.Due(False, False),
    lbopt.Due(True, False),
    lbopt.Due(True, True),
)


def optimizer(periods=PERIODS, **options):
    return lbopt.kfac(0.1, LAYERS, damping=1e-2, periods=periods, **options)


@pytest.mark.parametrize(
    ("devices", "options"),
    [
        (None, {}),
        (None, {"block_size": 3}),
        (4, {}),
        (3, {"inverses": "memory"}),
    ],
)
def test_programs_of_their_own_give_what_flags_give(devices, options):
    options = dict(options)
    place = spread(devices, options.pop("inverses", "comm"))
    tx, mesh = optimizer(**place, **options), mesh_of(devices)
    size = 8 if devices is None else 12

    def run(due_at):
        step = training.make_train_step(loss_fn, tx, LAYERS, mesh)
        state = training.init_state(tx, *START, RNG, mesh)
        for number in range(6):
            due = due_at(number)
            program, flags = (
                (step.program(due), lbopt.Due()) if due else (step.program(due), due)
            )
            state, _ = program(state, batch_of(number, size), None, flags)
        return state

    by_schedule = run(PERIODS.due)
    by_flags = run(lambda number: lbopt.Due())
    # Different programs: XLA fuses them differently, and inverses amplify rounding.
    assert_close(by_schedule.params, by_flags.params, rtol=1e-3, atol=1e-5)
    own, other = (lbopt.curvature_state(s.opt_state) for s in (by_schedule, by_flags))
    assert own.count == other.count == 6
    assert_equal(own.refresh, other.refresh)
    assert_equal(own.rejected, other.rejected)
    assert not np.any(own.rejected)


@pytest.mark.parametrize("number", [np.nan, np.inf])
@pytest.mark.parametrize("due", [NOTHING, STATISTICS, ALL])
def test_a_batch_that_is_not_finite_changes_nothing(due, number):
    tx = optimizer()
    step = training.make_train_step(loss_fn, tx, LAYERS)
    state = training.init_state(tx, *START, RNG)
    state, _ = step.program(ALL)(state, batch_of(0), None, lbopt.Due())
    before = jax.tree.map(jnp.copy, (state.params, state.opt_state, state.model_state))
    batch = batch_of(1)
    batch["x"] = batch["x"].at[0, 0].set(number)
    state, metrics = step.program(due)(state, batch, None, lbopt.Due())
    assert_equal((state.params, state.opt_state, state.model_state), before)
    assert metrics["skipped"] == 1
    assert metrics["first_not_finite"] == 0


def test_a_step_that_renews_nothing_has_no_loop_and_no_conditional():
    # Without the random numbers of the other loss, which are loops on a CPU; those of
    # the step's own key have their origin's name.
    problem = problems.classify(problems.Mlp())
    layers = problem.trace()
    tx = lbopt.kfac(0.1, layers, periods=PERIODS)

    def without_rng(params, model_state, batch, rng):
        del rng
        logits = problems.Mlp().apply({"params": params}, batch["x"])
        targets = jax.nn.one_hot(batch["y"], problems.CLASSES)
        lbopt.likelihood(logits, "categorical")
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        return loss, (model_state, {})

    step = training.make_train_step(without_rng, tx, layers)
    state = training.init_state(tx, problem.params, {}, RNG)

    def count(**due):
        text = step.lower(state, batch_of(0), **due).compile().as_text()
        lines = re.findall(r".* (?:while|conditional)\(.*", text)
        return sum("threefry" not in line for line in lines)

    assert count(due=NOTHING) == 0
    assert count(due=STATISTICS) == 0
    assert count() > 0  # or the test would see none


# ------------------------------------------------------------ which program is called


class Programs:
    """Programs that count a step, but for those of ``skip``, and say what they are."""

    def __init__(self, skip=()):
        self.called, self.skip = [], skip

    def __call__(self, kind):
        def program(state, batch, statistics_batch, flags):
            del batch, statistics_batch
            self.called.append((kind, flags))
            updated = state.opt_state
            if len(self.called) - 1 not in self.skip:
                updated = jax.tree.map(jnp.copy, updated)
                curvature = lbopt.curvature_state(updated)
                one_more = curvature._replace(count=curvature.count + 1)
                updated = (one_more, *updated[1:])
            return state._replace(step=state.step + 1, opt_state=updated), {}

        return program

    def kinds(self):
        return [kind for kind, _ in self.called]


def course(tx, steps, programs, static=True, start=None):
    step = ScheduledStep(programs, tx.init, static)
    state = training.init_state(tx, *START, RNG) if start is None else start
    for _ in range(steps):
        state, _ = step(state, None)
    return state


@functools.cache
def plain_kfac(periods=PERIODS):
    return optax.chain(lbopt.scale_by_kfac(LAYERS, periods=periods), optax.sgd(0.1))


def test_the_program_follows_from_the_number_of_the_step():
    programs = Programs()
    course(plain_kfac(), 6, programs)
    expected = [ALL, NOTHING, STATISTICS, NOTHING, ALL, NOTHING]
    assert programs.kinds() == expected


def test_a_cpu_has_one_program_with_flags_for_all_that_is_due():
    programs = Programs()
    course(plain_kfac(), 4, programs, static=None)
    flags = lbopt.Due()
    assert programs.kinds() == [flags, NOTHING, flags, NOTHING]
    given = [f for kind, f in programs.called if kind == flags]
    assert [tuple(map(bool, f)) for f in given] == [(True, True), (True, False)]
    assert all(isinstance(flag, np.ndarray) for f in given for flag in f)


def test_a_state_may_hold_arrays_of_numpy():
    tx = optimizer()
    step = training.make_train_step(loss_fn, tx, LAYERS)
    state = training.init_state(tx, *START, RNG)
    state, _ = step(state._replace(step=np.asarray(1)), batch_of(0))
    assert state.step == 2


def test_a_resumed_run_goes_on_where_it_was():
    tx, first, second = plain_kfac(), Programs(), Programs()
    state = course(tx, 3, first)
    course(tx, 3, second, start=jax.tree.map(jnp.copy, state))
    assert first.kinds() + second.kinds() == [PERIODS.due(i) for i in range(6)]


def test_all_is_due_until_the_first_update():
    programs = Programs(skip=(0, 1))
    course(plain_kfac(), 5, programs)
    # The third step is the first that is not skipped.
    assert programs.kinds() == [ALL, ALL, ALL, NOTHING, ALL]


def test_settings_of_the_optimizer_go_before_those_in_a_state():
    state = course(plain_kfac(), 1, Programs())
    programs = Programs()
    course(plain_kfac(lbopt.Periods(3, 3)), 3, programs, start=state)
    assert programs.kinds() == [NOTHING, NOTHING, ALL]


@pytest.mark.parametrize(
    ("tx", "flags"),
    [
        (plain_kfac(lbopt.Periods(2, 4, stagger=True)), (True, None)),
        (plain_kfac(lbopt.Periods(2, 4, delay=1)), (True, None)),
        (
            lbopt.scale_by_kfac(LAYERS, stale_threshold=0.1, factor_decay=0.0),
            (None, None),
        ),
        (lbopt.scale_by_kfac(LAYERS, eigenvalues="corrected"), (None, None)),
    ],
)
def test_flags_decide_what_the_host_cannot_know(tx, flags):
    programs = Programs()
    course(optax.chain(tx, optax.sgd(0.1)), 1, programs)
    ((kind, given),) = programs.called
    assert kind == lbopt.Due()
    assert given == lbopt.Due(*flags)


def test_inside_a_program_of_the_users_own_flags_decide():
    tx = optimizer()
    step = training.make_train_step(loss_fn, tx, LAYERS)

    @jax.jit
    def two(state):
        state, _ = step(state, batch_of(0))
        return step(state, batch_of(1))[0]

    found = two(training.init_state(tx, *START, RNG))
    state = training.init_state(tx, *START, RNG)
    for number in range(2):
        state, _ = step(state, batch_of(number))
    assert_close(found.params, state.params, rtol=1e-3, atol=1e-5)
