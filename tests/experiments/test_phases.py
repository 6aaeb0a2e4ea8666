"""Every second is booked, under the innermost phase."""

import pytest

from experiments import phases


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(phases.time, "perf_counter", lambda: now[0])

    def spend(seconds):
        now[0] += seconds

    return spend


def test_every_second_is_in_one_phase(clock):
    run = phases.Phases({})
    clock(1)
    with run.phase("input"):
        clock(2)
    with run.phase("evaluate"):
        clock(4)
        with run.phase("report"):
            clock(8)
            assert run.seconds()["report"] == 8, "also while it lasts"
        clock(16)
    clock(32)
    expected = dict.fromkeys(phases.PHASES, 0.0)
    expected |= {"other": 33, "input": 2, "evaluate": 20, "report": 8}
    assert run.seconds() == expected
    assert run.training() == 33 + 2 + 8


def test_a_phase_ends_with_an_error(clock):
    run = phases.Phases({})

    def fail():
        with run.phase("step"):
            clock(1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    clock(2)
    assert run.seconds()["step"] == 1
    assert run.seconds()["other"] == 2


def test_the_clock_goes_on_from_an_earlier_process(clock):
    run = phases.Phases({"step": 5.0, "checkpoint": 1.0})
    with run.phase("step"):
        clock(2)
    assert run.seconds()["step"] == 7
    assert run.training() == 7


def test_an_unknown_phase_is_refused():
    phase = phases.Phases({}).phase("io")
    with pytest.raises(ValueError, match=r"phase must be one of compile, input,.*'io'"):
        phase.__enter__()
