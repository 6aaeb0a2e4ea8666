"""The benchmark of staggered inversions."""

import functools

import jax
import pytest

from benchmarks import contestants, stagger, timing
from benchmarks.workloads import tiny
from lbopt import sharding


@pytest.fixture(scope="module")
def run(setup, run_command):
    """The record, and the reports of each step by the contestant's name."""
    reports = {"at once": [], "staggered": []}

    def watch(name, index, state):
        del index
        if name in reports:
            reports[name].append(jax.device_get(state.opt_state[1].report))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "race", functools.partial(timing.race, watch=watch))
        patch.setattr(contestants, "set_up", lambda workload: setup)
        return run_command(stagger.main, "--rounds", "1", make=tiny), reports


@pytest.mark.slow
def test_ratios_are_those_of_the_recorded_steps(run, check_contestants):
    record, _ = run
    names = ["SGD", "at once", "staggered"]
    check_contestants(record["contestants"], names, stagger.PERIOD, stagger.PERIOD)
    sgd, *others = record["contestants"]
    assert "ratios" not in sgd
    for runner in others:
        [own], [base] = runner["seconds"], sgd["seconds"]
        quotients = [a / b for a, b in zip(own, base, strict=True)]
        assert [r["median"] for r in runner["ratios"]] == pytest.approx(quotients)
        longest = runner["longest_over_median"]
        middle = sorted(quotients)[4:6]
        assert longest == pytest.approx(max(quotients) / (sum(middle) / 2))
    printed = stagger.table(record)
    for name in ("at once / SGD", "staggered / SGD", "counted, 8 devices"):
        assert name in printed
    assert "NOT FALLING" not in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["at once", "staggered"])
def test_nothing_but_inversions_differs_between_steps(run, setup, name):
    reports = run[1][name]
    statistics = [int(report.statistics.sum()) for report in reports]
    assert statistics[0] > 0
    assert statistics[1:] == [0] * (2 * stagger.PERIOD - 1)
    units = len(sharding.owner_table(setup.layers, 1).units)
    first, *warm_up = (int(report.inversions) for report in reports[: stagger.PERIOD])
    timed = [int(report.inversions) for report in reports[stagger.PERIOD :]]
    assert first == sum(timed) == units
    assert warm_up == timed[1:]
    assert len(set(timed)) == 2
    # 11 units: one step has two of them.
    assert sorted(timed)[-2:] == ([0, units] if name == "at once" else [1, 2])


def test_evenness_is_the_longest_over_the_median():
    assert stagger.evenness([1.0, 1.0, 1.0, 5.0]) == 5
    assert stagger.evenness([2, 2, 2]) == 1
    assert stagger.evenness([1.0, 3.0]) == 1.5


def test_work_is_counted_by_hand(setup):
    # Largest first: orders 36, 36, 27, 5, then G of the convolutions and of the head,
    # each at a step of its own, then norm layers.
    one = stagger.counted(setup.layers, 1)
    assert one["work"][:8] == [36**3, 36**3, 27**3, 5**3, 4**3, 4**3, 4**3, 3**3]
    assert one["longest_over_median"] == 36**3 / 4**3
