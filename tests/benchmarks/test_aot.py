"""Steps compiled for devices that are not there: the command, its cases and record."""

import argparse
import json
from concurrent.futures.process import BrokenProcessPool

import pytest

from benchmarks import aot, aot_steps, harness
from benchmarks.aot_figures import PART_NAMES
from benchmarks.aot_steps import Target

ON_CPU = ("--target", "cpu:2", "--model", "tiny")


def fake(seconds, **other):
    """What compiling a case adds to its row."""
    memory = dict.fromkeys(("code", "arguments", "temporaries", "total"), 2_000_000)
    return {
        "lower_seconds": 1.0,
        "compile_seconds": seconds,
        "compile_cpu_seconds": 2 * seconds,
        "text_bytes": 3_000_000,
        "memory": memory | {"fits": True},
        "instructions": {"while": 5, "fusion": 70},
        "collectives": [
            {"kind": "all-reduce", "part": part, "count": 1, "bytes": 10**6}
            for part in PART_NAMES[:2]
        ],
        "statistics_all_reduce": 4321,
        "cycles": dict.fromkeys(PART_NAMES, 2_000_000),
        "open_loops": 1,
        **other,
    }


def test_a_step_is_compiled_in_a_child_and_not_again(tmp_path, monkeypatch, capsys):
    output = tmp_path / "aot.json"
    arguments = [*ON_CPU, "--optimizer", "sgd", "--output", str(output)]
    programs = tmp_path / "programs"
    first = aot.main([*arguments, "--programs", str(programs)])
    assert json.loads(output.read_text("utf-8")) == first
    [row] = first["rows"]
    assert row["compile_seconds"] > 0
    assert row["compile_cpu_seconds"] > 0
    assert row["memory"]["arguments"] > 2 * 8 * 8 * 8 * 3  # images in bfloat16
    assert row["memory"]["fits"] is True
    # The mean of gradients and loss, and that of the model's running averages.
    assert {one["kind"] for one in row["collectives"]} == {"all-reduce"}
    assert row["statistics_all_reduce"] == 0
    assert row["versions"]["jax"]
    assert [path.name for path in programs.iterdir()] == ["cpu_2-tiny-sgd.hlo.gz"]
    printed = capsys.readouterr().out
    assert "**cpu:2, tiny, 8 images of 8×8 a device, default effort**" in printed

    def compiled_twice(case, programs):
        raise AssertionError(case)

    monkeypatch.setattr(aot, "in_child", compiled_twice)
    second = aot.main(arguments)
    assert second["rows"] == first["rows"]
    assert "| sgd |" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="tiny"):
        aot.main([*arguments, "--again"])


def test_ratios_are_over_the_sgd_of_the_same_run(tmp_path, monkeypatch, capsys):
    output = tmp_path / "aot.json"
    seconds = iter([2.0, 8.0, 4.0, 8.0])
    monkeypatch.setattr(aot, "in_child", lambda case, programs: fake(next(seconds)))
    dates = iter("12")
    begin = harness.begin
    monkeypatch.setattr(
        harness, "begin", lambda *args: begin(*args) | {"date": next(dates)}
    )
    for optimizer in ("lars", "nlcg"):
        arguments = [*ON_CPU, "--optimizer", optimizer, "--output", str(output)]
        record = aot.main(arguments)
    assert [row["optimizer"] for row in record["rows"]] == [
        "sgd",
        "lars",
        "sgd",
        "nlcg",
    ]
    print(aot.table(record["rows"]))
    lines = capsys.readouterr().out.splitlines()
    sizes = {line.split(" | ")[0][2:]: line for line in lines if "yes" in line}
    assert (
        "8.0 (4.00×) | 16.0 (4.00×)" in sizes["lars"]
    )  # the first run's, and not the last one's
    assert "8.0 (2.00×)" in sizes["nlcg"]
    assert "| 5 | 0 | 70 | 0 | 2 (2.0) |" in sizes["nlcg"]
    assert "4,321" in sizes["nlcg"]
    [costs] = [line for line in lines[-4:] if line.startswith("| nlcg")]
    assert "10.0 (1.00×) | 8.0 (0.80×) | 2.00 |" in costs


def test_a_failure_is_a_row_and_ends_nothing(tmp_path, monkeypatch, capsys):
    def fail(function, case, programs):
        if case.optimizer == "lars":
            raise BrokenProcessPool
        return fake(3.0)

    monkeypatch.setattr(harness, "in_new_process", fail)
    arguments = [*ON_CPU, "--optimizer", "lars", "nlcg"]
    arguments += ["--output", str(tmp_path / "aot.json")]
    record = aot.main(arguments)
    assert ["error" in row for row in record["rows"]] == [False, True, False]
    assert "| lars | FAILED the process died" in capsys.readouterr().out
    # It is tried again, with an SGD of the same run before it.
    record = aot.main(arguments)
    optimizers = [row["optimizer"] for row in record["rows"]]
    assert optimizers == ["sgd", "lars", "nlcg", "sgd", "lars"]


def test_a_missing_compiler_is_refused_by_name(monkeypatch, capsys):
    monkeypatch.setattr(aot_steps, "version", lambda package: None)
    with pytest.raises(SystemExit):
        aot.main(["--target", "v5e:4", "h100:1"])
    printed = capsys.readouterr().err
    assert "v5e:4 is left out: its compiler is in libtpu" in printed
    assert "pip install 'lbopt[aot-tpu]'" in printed
    assert "pip install 'lbopt[aot-gpu]'" in printed


@pytest.mark.parametrize("text", ["v5e", "v5e:3", "a100:1", "cpu:0", "h100:x"])
def test_an_unknown_target_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match=f"'{text}' is not a target"):
        aot_steps.parse_target(text)


def test_the_cases_that_have_bounds(monkeypatch):
    asked = []
    monkeypatch.setattr(aot_steps, "version", lambda package: "1")
    monkeypatch.setattr(
        aot, "in_child", lambda case, programs: asked.append(case) or fake(1.0)
    )
    aot.main(["--acceptance"])
    assert {str(case.target) for case in asked} == {
        *("h100:1", "h100:8", "v5e:4", "v5e:16", "v5e:64", "v5e:256")
    }
    # One SGD for each problem, the first of its cases.
    problems = [case.problem() for case in asked if case.optimizer == "sgd"]
    assert problems == list(dict.fromkeys(case.problem() for case in asked))
    steps = [case.step() for case in asked if case.target == Target("v5e", 4)]
    assert {"sp_ngd comm none", "sp_ngd comm reduce all"} <= set(steps)
    assert {"sp_ngd memory all", "sp_ngd_adaptive comm flags"} <= set(steps)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v5e:4", "v6e:4", "v5p:4", "h100:1", "h100:8"])
def test_a_small_step_compiles_for_every_target(target):
    kind = aot_steps.parse_target(target).kind
    if message := kind.missing():
        pytest.skip(message)
    options = f"--target {target} --model tiny --optimizer sp_ngd --due none all"
    record = aot.main(options.split())
    sgd, none, due = record["rows"]
    assert not [row["error"] for row in record["rows"] if "error" in row]
    assert all(row["memory"]["fits"] for row in record["rows"])
    assert none["instructions"].get("while", 0) == 0
    assert none["instructions"].get("conditional", 0) == 0
    if kind.platform == "tpu":
        assert set(due["cycles"]) == set(PART_NAMES)
        assert "inversion" not in none["cycles"]
        assert sum(sgd["cycles"].values()) < sum(due["cycles"].values())
