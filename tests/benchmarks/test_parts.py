"""The parts of a long measurement: budget, limits, processes, and what is repeated."""

import json
import os
import time

import pytest

from benchmarks import parts
from benchmarks.parts import Outcome, Part, Run

IDENTITY = {"code": "a", "device": "x"}


def leave(run, *, code):
    run.report("before", {"left": code})
    os._exit(code)


def refuse(run, *, why):
    raise parts.NotNeededError(why)


def divide(run, *, by):
    run.report("quotient", {"value": 1 / by})


def at_once(part, run, folder):
    """Without a process, and without the cache of programs."""
    try:
        part.measure(run, **part.settings)
    except ZeroDivisionError as error:
        return Outcome("failed", str(error))
    return Outcome("done")


@pytest.fixture
def carry_out(tmp_path):
    record = {}

    def carry_out(*some, identity=IDENTITY, budget=100.0, **options):
        options = {"start": at_once} | options
        parts.carry_out(some, record, tmp_path, identity, budget=budget, **options)
        assert json.loads((tmp_path / "record.json").read_text("utf-8")) == record
        return record["parts"]

    return carry_out


def halves(**settings):
    return Part("halves", divide, 30.0, {"by": 2} | settings)


def test_a_part_is_repeated_only_where_something_else_measured_it(carry_out):
    calls = []

    def start(part, run, folder):
        calls.append(part.name)
        return at_once(part, run, folder)

    done = carry_out(halves(), start=start)["halves"]
    assert (done["status"], done["rows"]) == ("done", {"quotient": {"value": 0.5}})
    assert done["identity"] == IDENTITY | {"settings": {"by": 2}}
    carry_out(halves(), start=start)
    assert len(calls) == 1
    carry_out(halves(), start=start, again=True)
    assert len(calls) == 2
    carry_out(halves(), start=start, identity=IDENTITY | {"code": "b"})
    assert len(calls) == 3
    carry_out(halves(by=4), start=start, identity=IDENTITY | {"code": "b"})
    assert len(calls) == 4


def test_a_part_that_fails_is_tried_again_and_stops_no_other(carry_out):
    entries = carry_out(Part("fails", divide, 30.0, {"by": 0}), halves())
    assert [e["status"] for e in entries.values()] == ["failed", "done"]
    assert entries["fails"]["why"] == "division by zero"
    repaired = carry_out(Part("fails", divide, 30.0, {"by": 1}), halves())
    assert repaired["fails"]["status"] == "done"


def test_no_part_begins_once_the_budget_is_spent(carry_out):
    entries = carry_out(halves(), budget=1.0)
    assert entries["halves"]["status"] == "skipped"
    assert "budget of 1 s is spent" in entries["halves"]["why"]
    assert carry_out(halves())["halves"]["status"] == "done"


def test_rows_of_a_part_that_was_stopped_stay_and_limits_end_with_the_budget(carry_out):
    deadlines = []

    def stopped(part, run, folder):
        deadlines.append(run.left())
        run.report("first", {"value": 1})
        return Outcome("stopped", "its time limit was reached")

    part = Part("long", divide, 30.0, {"by": 2})
    carry_out(part, start=stopped, budget=100.0)
    carry_out(part, start=stopped, budget=20.0)
    assert 29 < deadlines[0] <= 30
    assert 19 < deadlines[1] <= 20
    entries = carry_out(part, start=stopped, budget=1.0)
    assert len(deadlines) == 2
    assert entries["long"]["status"] == "stopped"
    assert entries["long"]["rows"] == {"first": {"value": 1}}


def test_a_part_sees_the_rows_of_those_before(carry_out):
    seen = {}

    def start(part, run, folder):
        seen[part.name] = {name: dict(rows) for name, rows in run.rows.items()}
        return at_once(part, run, folder)

    carry_out(halves(), Part("next", divide, 30.0, {"by": 1}), start=start)
    assert seen["next"]["halves"] == {"quotient": {"value": 0.5}}


def test_a_part_in_this_process_reports_what_went_wrong(tmp_path):
    run = Run({}.__setitem__, time.time() + 30, {})
    part = Part("none", refuse, 30.0, {"why": "nothing to measure"})
    outcome = parts.at_once(part, run, tmp_path)
    assert outcome == Outcome("skipped", "nothing to measure")
    part = Part("none", divide, 30.0, {"by": 0})
    outcome = parts.at_once(part, run, tmp_path)
    assert outcome == Outcome("failed", "ZeroDivisionError: division by zero")


def test_a_process_that_dies_leaves_its_rows(tmp_path):
    rows = {}
    run = Run(rows.__setitem__, time.time() + 60, {})
    part = Part("dies", leave, 60.0, {"code": 9})
    outcome = parts.in_own_process(part, run, tmp_path)
    assert outcome == Outcome("failed", "its process ended with code 9")
    assert rows == {"before": {"left": 9}}


def test_a_process_ends_at_its_deadline(tmp_path):
    run = Run({}.__setitem__, time.time(), {})
    start = time.time()
    outcome = parts.in_own_process(halves(), run, tmp_path)
    assert outcome.status == "stopped"
    assert time.time() - start < 5


def test_the_digest_is_that_of_the_code(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    (tmp_path / "lbopt").mkdir()
    file = tmp_path / "lbopt" / "one.py"
    digests = []
    for text in ("a = 1\n", "a = 2\n", "a = 1\n"):
        file.write_text(text)
        digests.append(parts.code()["digest"])
    assert digests[0] == digests[2] != digests[1]
    assert parts.code()["commit"] is None
