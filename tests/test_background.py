"""Inversion in the background: the same numbers, and nothing that stops a run."""

import functools
import os
import signal
import time

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lbopt
from lbopt import background, sharding, training
from lbopt.transforms.kfac_state import KfacState
from tests.problems import assert_equal
from tests.test_distributed import PARAMS, ROUNDING, batch_of, layers, loss_fn
from tests.transforms.test_kfac import assert_natural
from tests.transforms.test_renewal import DAMPING, DECAY, STEPS, Course

OUTSIDE = lbopt.Periods(inverses=None)


class Training:
    """Steps of a problem in float64 with inverses from outside."""

    def __init__(self, course):
        self.course = course
        tx = lbopt.scale_by_kfac(
            course.layers, damping=DAMPING, factor_decay=DECAY, periods=OUTSIDE
        )
        self.state, self.steps = tx.init(course.problem.params), 0
        self.update = jax.jit(lambda g, s, c: tx.update(g, s, curvature=c))

    def step(self, exchange=None):
        grads, curvature = self.course.given[self.steps % len(self.course.given)]
        updates, self.state = self.update(grads, self.state, curvature)
        self.steps += 1
        if exchange is not None:
            self.state = exchange(self.state)
        return updates

    def ages(self):
        ages = jax.tree.leaves(lbopt.inverse_age(self.state))
        return sorted({int(age) for age in ages})


@functools.cache
def course():
    return Course(range(STEPS))


@pytest.fixture
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.usefixtures("_float64")
@pytest.mark.parametrize("delay", [1, 3])
def test_a_delay_says_which_factors_a_step_uses(delay):
    run = Training(course())
    with lbopt.BackgroundInversion(course().layers, delay=delay) as exchange:
        results = [run.step(exchange) for _ in range(STEPS)]
    # One order is under way at a time: the next leaves when the last has come.
    period = max(delay - 1, 1)
    for t, updates in enumerate(results):
        made = max(k for k in range(0, t + 1, period) if k == 0 or k + delay <= t)
        given, averages = course().given[t][0], course().averages[made]
        assert_natural(updates, given, averages, DAMPING, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("_float64")
def test_as_soon_as_possible_and_never_waiting():
    run = Training(course())
    ages = []
    with lbopt.BackgroundInversion(course().layers) as exchange:
        ends = time.monotonic() + 60
        while sum(age < [step] for step, age in enumerate(ages)) < 3:
            run.step(exchange)
            ages.append(run.ages())
            assert time.monotonic() < ends, ages[-5:]
            time.sleep(0.05)
    # Training went on while the process started: inverses of step 0 had grown old.
    assert max(ages) > [3]


@pytest.mark.usefixtures("_float64")
def test_a_process_that_is_killed_is_replaced():
    run = Training(course())
    with lbopt.BackgroundInversion(course().layers, delay=2) as exchange:
        for _ in range(3):
            run.step(exchange)
        exchange.wait()  # it has come, and has effect after the next step
        os.kill(exchange._process.pid, signal.SIGKILL)
        run.step(exchange)
        assert run.ages() == [1]
        last = jax.tree.map(np.asarray, run.state.inverses)
        message = r"failed at call 5 .*last good inverses, and a new process tries"
        with pytest.warns(RuntimeWarning, match=message):
            run.step(exchange)
        assert_equal(run.state.inverses, last)
        assert run.ages() == [2]
        run.step(exchange)
        assert run.ages() == [1]


@pytest.mark.usefixtures("_float64")
def test_a_worker_that_raises_is_given_up_after_three_times(monkeypatch):
    start = background._start

    def broken(job):
        return start(job._replace(functions=[os.getpid] * len(job.functions)))

    monkeypatch.setattr(background, "_start", broken)
    run = Training(course())
    with lbopt.BackgroundInversion(course().layers, delay=1) as exchange:
        for _ in range(2):
            with pytest.warns(
                RuntimeWarning, match="(?s)TypeError.*a new process tries"
            ):
                run.step(exchange)
        with pytest.warns(RuntimeWarning, match="no further attempt is made"):
            run.step(exchange)
        updates = run.step(exchange)  # no warning any more
    # On with the inverses of the first step.
    assert run.ages() == [3]
    given, averages = course().given[3][0], course().averages[0]
    assert_natural(updates, given, averages, DAMPING, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("_float64")
def test_numbers_that_are_not_finite_are_refused():
    run = Training(course())
    with lbopt.BackgroundInversion(course().layers, delay=1) as exchange:
        for _ in range(2):
            run.step(exchange)
        last = jax.tree.map(np.asarray, run.state.inverses)
        run.step()
        damping = run.state.damping
        run.state = exchange(run.state._replace(damping=damping * jnp.nan))
        assert_equal(run.state.inverses, last)
        assert run.state.boost.tolist() == [10.0, 10.0]
        assert run.state.rejected.tolist() == [1, 1]
        run.step(exchange)
        assert run.ages() == [0]
        assert run.state.boost.tolist() == [1.0, 1.0]


@pytest.mark.usefixtures("_float64")
def test_a_checkpoint_at_any_moment():
    run = Training(course())
    with lbopt.BackgroundInversion(course().layers, delay=3) as exchange:
        for _ in range(4):
            run.step(exchange)
        asleep = flax.serialization.to_bytes(run.state)  # one order is under way
    again = Training(course())
    again.state = flax.serialization.from_bytes(again.state, asleep)
    again.steps = run.steps
    assert_equal(again.state, run.state)
    with lbopt.BackgroundInversion(course().layers, delay=2) as exchange:
        again.step(exchange)
        assert again.ages() == [4]  # the saved inverses, of step 0
        again.step(exchange)
        assert again.ages() == [1]  # of step 4


# ------------------------------------------------------------------ several devices


def losses_of(steps, devices=None, inverses="comm"):
    mesh, options = None, {"periods": OUTSIDE}
    if devices is not None:
        mesh = sharding.make_mesh(jax.devices()[:devices])
        options["placement"] = lbopt.Placement("data", devices, inverses)
    tx = lbopt.kfac(0.05, layers(), damping=1e-2, block_size=7, **options)
    state = training.init_state(tx, PARAMS, {}, jax.random.key(1), mesh)
    step = training.make_train_step(loss_fn, tx, layers(), mesh)
    where = jax.tree.map(lambda x: x.sharding, state) if devices else None
    losses = []
    with lbopt.BackgroundInversion(layers(), block_size=7, delay=2) as exchange:
        for i in range(steps):
            state, metrics = step(state, batch_of(i))
            state = exchange(state)
            losses.append(float(metrics["loss"]))
    if devices is not None:
        moved = jax.tree.map(
            lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), state, where
        )
        assert all(jax.tree.leaves(moved))
    ages = jax.tree.leaves(lbopt.inverse_age(state.opt_state))
    assert {int(age) for age in ages} == {1}
    return np.asarray(losses)


@functools.cache
def alone():
    return losses_of(6)


@pytest.mark.parametrize(
    "placement", [pytest.param("memory", marks=pytest.mark.slow), 0.5]
)
def test_on_several_devices(placement):
    spread = losses_of(6, 4, placement)
    np.testing.assert_allclose(spread, alone(), rtol=ROUNDING)


# ------------------------------------------------------------------------- errors


def test_settings_out_of_range():
    with pytest.raises(ValueError, match=r"delay=0 must be a whole number, ≥ 1"):
        lbopt.BackgroundInversion(layers(), delay=0)
    with pytest.raises(ValueError, match=r"cores=\[4096\] must be among the \d+ of"):
        lbopt.BackgroundInversion(layers(), cores=[4096])


@pytest.mark.parametrize("number", [0, 2])
def test_a_state_without_one_curvature_transform(number):
    tx = optax.chain(*[lbopt.scale_by_kfac(layers())] * number, optax.scale(1.0))
    with lbopt.BackgroundInversion(layers()) as exchange:
        message = rf"opt_state=tuple must hold one curvature transform, not {number}; "
        with pytest.raises(ValueError, match=message):
            exchange(tx.init(PARAMS))


def test_nothing_is_left_behind():
    exchange = lbopt.BackgroundInversion(layers(), delay=1)
    tx = lbopt.scale_by_kfac(layers(), periods=OUTSIDE)
    state = exchange(tx.init(PARAMS))
    assert isinstance(state, KfacState)
    process, folder = exchange._process, exchange._folder.name
    assert process.poll() is None
    exchange.close()
    assert process.poll() is not None
    assert not os.path.exists(folder)
    with pytest.raises(RuntimeError, match=r"is closed; use it inside its with block"):
        exchange(state)


@pytest.mark.parametrize("devices", [None, 2])
def test_blocks_of_another_size_are_refused(devices):
    placement = lbopt.Placement() if devices is None else lbopt.Placement("data", 2)
    tx = lbopt.scale_by_kfac(
        layers(), periods=OUTSIDE, block_size=7, placement=placement
    )
    state = tx.init(PARAMS)
    message = r"block_size of .* must be the optimizer's"
    whole = lbopt.BackgroundInversion(layers())
    with whole, pytest.raises(ValueError, match=message):
        whole(state)
    with lbopt.BackgroundInversion(layers(), block_size=7) as exchange:
        exchange(state)
