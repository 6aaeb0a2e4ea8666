"""The benchmark of staggered inversions, whole, on a network that compiles in seconds.

Nothing is asserted of the times themselves.
"""

import json
import math
from typing import NamedTuple

import jax
import pytest

from benchmarks import contestants, stagger, timing
from benchmarks.workloads import tiny
from lbopt import sharding


class Run(NamedTuple):
    record: dict
    written: dict
    reports: dict  # of each step, by the contestant's name


@pytest.fixture(scope="module")
def setup():
    return contestants.set_up(tiny())


@pytest.fixture(scope="module")
def layers(setup):
    return setup.layers


@pytest.fixture(scope="module")
def run(setup, tmp_path_factory):
    path = tmp_path_factory.mktemp("stagger") / "record.json"
    arguments = ["--workload", "tiny", "--rounds", "1", "--output", str(path)]
    reports = {}
    turns = timing.turns

    def watched(*args):
        for turn in turns(*args):
            if turn.name != "SGD":
                report = turn.state.opt_state[1].report
                reports.setdefault(turn.name, []).append(jax.device_get(report))
            yield turn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "turns", watched)
        patch.setattr(contestants, "set_up", lambda workload: setup)
        record = stagger.main(arguments)
    return Run(record, json.loads(path.read_text("utf-8")), reports)


# ------------------------------------------------------------------ the whole command


@pytest.mark.slow
def test_the_command_writes_its_record(run):
    record = run.record
    assert run.written == record
    assert record["command"].startswith("python -m benchmarks.stagger --workload")
    assert [c["name"] for c in record["contestants"]] == ["SGD", "at once", "staggered"]
    for contestant in record["contestants"]:
        assert [len(row) for row in contestant["seconds"]] == [stagger.PERIOD]
        assert len(contestant["losses"]) == 2 * stagger.PERIOD
        assert all(map(math.isfinite, contestant["losses"]))
        assert contestant["losses"][-1] < contestant["losses"][0]
    json.dumps(record, allow_nan=False)


@pytest.mark.slow
def test_ratios_are_those_of_the_recorded_steps(run):
    sgd, *others = run.record["contestants"]
    assert "ratios" not in sgd
    for runner in others:
        [own], [base] = runner["seconds"], sgd["seconds"]
        quotients = [a / b for a, b in zip(own, base, strict=True)]
        assert [r["median"] for r in runner["ratios"]] == pytest.approx(quotients)
        longest = runner["longest_over_median"]
        middle = sorted(quotients)[4:6]
        assert longest == pytest.approx(max(quotients) / (sum(middle) / 2))


@pytest.mark.slow
def test_the_table_names_all(run):
    printed = stagger.table(run.record)
    for name in ("at once / SGD", "staggered / SGD", "counted, 8 devices", "longest ≤"):
        assert name in printed
    assert "≥ 0  NOT KEPT, not required" in printed
    assert "NOT FALLING" not in printed


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--workload", "none"]])
def test_a_bad_setting_is_refused_at_once(arguments, capsys):
    with pytest.raises(SystemExit):
        stagger.main(arguments)
    assert arguments[0] in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["at once", "staggered"])
def test_nothing_but_inversions_differs_between_steps(run, layers, name):
    reports = run.reports[name]
    statistics = [int(report.statistics.sum()) for report in reports]
    assert statistics[0] > 0
    assert statistics[1:] == [0] * (2 * stagger.PERIOD - 1)
    units = len(sharding.owner_table(layers, 1).units)
    first, *warm_up = (int(report.inversions) for report in reports[: stagger.PERIOD])
    timed = [int(report.inversions) for report in reports[stagger.PERIOD :]]
    assert first == sum(timed) == units
    assert warm_up == timed[1:]
    assert len(set(timed)) == 2
    # 11 units: one step has two of them.
    assert sorted(timed)[-2:] == ([0, units] if name == "at once" else [1, 2])


# -------------------------------------------------------------------------- its parts


def test_ratios_pair_steps_of_a_round():
    # The machine is twice as slow in the second round, and a step of it took long.
    base = [[1.0, 1.0], [2.0, 2.0], [1.0, 1.0]]
    own = [[3.0, 1.0], [6.0, 9.0], [3.0, 2.0]]
    first, second = stagger.ratios(own, base)
    assert first == (3.0, 3.0, 3.0)
    assert second == (2.0, 1.0, 4.5)


def test_evenness_is_the_longest_over_the_median():
    assert stagger.evenness([1.0, 1.0, 1.0, 5.0]) == 5
    assert stagger.evenness([2, 2, 2]) == 1
    assert stagger.evenness([1.0, 3.0]) == 1.5


def test_work_is_counted_by_hand(layers):
    # Largest first: orders 36, 36, 27, 5, then G of the convolutions and of the head,
    # each at a step of its own, then norm layers.
    one = stagger.counted(layers, 1)
    assert one["work"][:8] == [36**3, 36**3, 27**3, 5**3, 4**3, 4**3, 4**3, 3**3]
    assert one["longest_over_median"] == 36**3 / 4**3
    assert (one["fewest_blocks"], one["bound_applies"]) == (2, False)
    assert stagger.counted(layers, 4)["fewest_blocks"] == 0


def test_the_bound_applies_where_blocks_suffice(layers, monkeypatch):
    monkeypatch.setattr(stagger, "ENOUGH", 2)
    assert stagger._verdict(stagger.counted(layers, 1)) == "NOT KEPT"
    monkeypatch.setattr(stagger, "BOUND", 1000)
    assert stagger._verdict(stagger.counted(layers, 1)) == "kept"
    assert stagger._verdict(stagger.counted(layers, 4)) == "kept, not required"
