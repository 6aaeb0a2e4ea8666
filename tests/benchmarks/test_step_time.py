"""The step-time benchmark, whole, on a network that compiles in seconds.

Nothing is asserted of the times themselves.
"""

import importlib.util
import json
import math
import re

import jax
import pytest

from benchmarks import step_time, timing, workloads


def _check(result: dict, names: list[str]) -> None:
    assert [c["name"] for c in result["contestants"]] == names
    for contestant in result["contestants"]:
        assert len(contestant["losses"]) == 2 * len(timing.CYCLE)
        assert all(map(math.isfinite, contestant["losses"]))
        assert contestant["losses"][-1] < contestant["losses"][0]
        assert contestant["compile_seconds"] > 0
        assert contestant["state_bytes"] > 0
        assert contestant["temporary_bytes"] >= 0
        for s in (
            *contestant["milliseconds"].values(),
            *contestant.get("ratios", {}).values(),
        ):
            assert 0 < s["low"] <= s["median"] <= s["high"]
    sgd, *others = result["contestants"]
    assert "ratios" not in sgd
    for contestant in others:
        assert list(contestant["ratios"]) == list(timing.SETTINGS)
        # The first loss is taken before any update: all start from the same point.
        assert contestant["losses"][0] == pytest.approx(sgd["losses"][0], rel=1e-4)


def test_command_prints_a_table_and_writes_the_record(tmp_path, capsys):
    path = tmp_path / "record.json"
    record = step_time.main(
        ["--workload", "tiny", "--rounds", "1", "--peers", "--output", str(path)]
    )
    assert json.loads(path.read_text("utf-8")) == record
    assert {"processor", "cores", "versions", "date", "command"} <= record.keys()
    assert record["versions"]["jax"] == jax.__version__
    [result] = record["workloads"]
    _check(result, ["SGD", "lbopt"])
    printed = capsys.readouterr().out
    assert re.search(r"lbopt / SGD( +\d+\.\d\d \(\d+\.\d\d–\d+\.\d\d\)){5}", printed)
    assert "compile s" in printed
    assert "NOT" not in printed


def test_ratios_pair_the_steps_of_a_round():
    # A machine that is twice as slow in the second round changes no ratio.
    own = [[8.0, 1.0, 4.0, 3.0], [16.0, 2.0, 8.0, 6.0]]
    sgd = [[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]]
    ratios = timing.ratios(own, sgd)
    assert {name: r.median for name, r in ratios.items()} == pytest.approx(
        {"none": 2.0, "stats": 4.0, "full": 8.0, "1/10": 4.4, "10/10": 2.6}
    )
    assert all(r.low == r.high for r in ratios.values())


def test_a_missing_peer_is_named(monkeypatch, capsys):
    monkeypatch.setattr(step_time, "find_spec", lambda name: None)
    assert not step_time._installed("kfac_jax")
    assert "lbopt[bench]" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--workload", "none"]])
def test_a_bad_setting_is_refused_at_once(arguments, capsys):
    with pytest.raises(SystemExit):
        step_time.main(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_the_autoencoder_is_mirrored():
    workload = workloads.autoencoder("small", sizes=(12, 6, 3), batch_size=5)
    shapes = [layer["kernel"].shape for layer in workload.params.values()]
    assert shapes == [(12, 6), (6, 3), (3, 6), (6, 12)]


@pytest.mark.skipif(
    importlib.util.find_spec("kfac_jax") is None, reason="kfac-jax is not installed"
)
@pytest.mark.filterwarnings("ignore")  # what the peer warns of is not ours to act on
def test_kfac_jax_takes_part():
    with jax.numpy_rank_promotion("allow"):  # the peer relies on it
        result = step_time.measure(workloads.tiny(), 1, peers=["kfac_jax"])
    _check(result, ["SGD", "lbopt", "kfac-jax"])
