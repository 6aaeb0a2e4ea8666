"""The step-time benchmark."""

import importlib.util
import re

import jax
import pytest

from benchmarks import step_time, workloads

NAMES = ["SGD", "lbopt", "lbopt, EKFAC"]


@pytest.fixture
def check(check_contestants):
    def check(result, names):
        entries = result["contestants"]
        check_contestants(entries, names, steps=4, warm_up=4)
        assert list(entries[0]["milliseconds"]) == ["step"]
        for e in entries[1:]:
            assert list(e["ratios"]) == list(step_time.SETTINGS)
            assert list(e["milliseconds"]) == ["full", "none", "stats"]
            for s in (*e["milliseconds"].values(), *e["ratios"].values()):
                assert 0 < s["low"] <= s["median"] <= s["high"]

    return check


def test_command_prints_a_table_and_writes_the_record(
    run_command, check, capsys, monkeypatch
):
    monkeypatch.setattr(step_time, "find_spec", lambda name: None)
    record = run_command(step_time.main, "--workload", "tiny", "--rounds", "1")
    [result] = record["workloads"]
    check(result, NAMES)
    printed = capsys.readouterr().out
    assert re.search(r"lbopt / SGD( +\d+\.\d\d \(\d+\.\d\d–\d+\.\d\d\)){5}", printed)
    assert "compile s" in printed
    assert "NOT" not in printed
    assert "lbopt[bench]" in printed  # has the peer that is missing


def test_ratios_pair_the_steps_of_a_round():
    # A machine that is twice as slow in the second round changes no ratio.
    own = [[8.0, 1.0, 4.0, 3.0], [16.0, 2.0, 8.0, 6.0]]
    sgd = [[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]]
    ratios = step_time.ratios(own, sgd)
    assert {name: r.median for name, r in ratios.items()} == pytest.approx(
        {"none": 2.0, "stats": 4.0, "full": 8.0, "1/10": 4.4, "10/10": 2.6}
    )
    assert all(r.low == r.high for r in ratios.values())


@pytest.mark.skipif(
    importlib.util.find_spec("kfac_jax") is None, reason="kfac-jax is not installed"
)
@pytest.mark.filterwarnings("ignore")  # what the peer warns of is not ours to act on
def test_kfac_jax_takes_part(check):
    with jax.numpy_rank_promotion("allow"):  # the peer relies on it
        result = step_time.measure(workloads.tiny(), 1)
    check(result, [*NAMES, "kfac-jax"])
