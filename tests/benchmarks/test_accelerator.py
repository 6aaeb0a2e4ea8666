"""The measurement of an accelerator, carried out on a CPU.

Nothing is asserted of times themselves.
"""

import json
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    accelerator,
    accelerator_agreement,
    accelerator_entrants,
    accelerator_inverses,
    accelerator_steps,
    accelerator_tables,
    parts,
)
from benchmarks.accelerator_entrants import Network

CASES = accelerator_agreement.CASES
TINY = accelerator.Sizes(
    network=Network("tiny", 8, 3, "bfloat16"),
    eigen_network=Network("tiny", 8, 3, "bfloat16"),
    batch_size=4,
    eigen_batch=4,
    most=8,
    matrices=((1, 8), (3, 8), (1, 12)),
    eigh_most=8,
    rounds=1,
)


def run_of(rows, left=60.0):
    return parts.Run(rows.__setitem__, time.time() + left, {})


# === The command ======================================================================


def check_steps(rows, names):
    assert list(rows) == ["SGD", *names]
    for name, row in rows.items():
        assert row["skipped"] == 0, name
        assert "NOT FINITE" not in row["course"]
        assert row["state_bytes"] > 0
        assert {b["total"] > b["temporary"] for b in row["bytes"].values()} == {True}
        for s in (*row["ratios"].values(), *row["milliseconds"].values()):
            assert 0 < s["low"] <= s["median"] <= s["high"]
    # A round of K-FAC has every kind of step; the statistics of one batch stay
    # similar, so that SP-NGD renews all or none.
    if "K-FAC" in rows:
        assert set(rows["K-FAC"]["milliseconds"]) == {"none", "stats", "full"}
        assert rows["K-FAC"]["state_bytes"] > 2 * rows["SGD"]["state_bytes"]
    if "SP-NGD" in rows:
        assert set(rows["SP-NGD"]["milliseconds"]) == {"none", "full"}


def check_shares(rows):
    assert list(rows) == ["gradient", "with statistics", "update"]
    assert set(rows["update"]) == {"none", "stats", "full"}


def test_parts_are_measured_written_and_not_repeated(tmp_path, monkeypatch, capsys):
    kept = ("curvature", "shares", "inverses")
    whole = accelerator.plan(TINY)
    monkeypatch.setattr(
        accelerator, "plan", lambda *_: [p for p in whole if p.name in kept]
    )
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    arguments = ["--folder", str(tmp_path), "--budget", "300"]
    record = accelerator.main(arguments, sizes=TINY, start=parts.at_once)
    assert json.loads((tmp_path / "record.json").read_text()) == record
    assert {e["status"] for e in record["parts"].values()} == {"done"}
    assert record["environment"] == {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}
    found = {name: entry["rows"] for name, entry in record["parts"].items()}
    check_steps(found["curvature"], ["K-FAC", "SP-NGD"])
    check_shares(found["shares"])
    assert list(found["inverses"]) == ["8", "3 of 8", "12"]
    assert set(found["inverses"]["12"]) == {"cholesky", "damped_inverse"}
    page = (tmp_path / "table.md").read_text()
    for text in ("## Curvature", "| SP-NGD |", "| inversion |", "| 3 of 8 |"):
        assert text in page
    assert "Programs apart:" in page
    capsys.readouterr()
    again = accelerator.main(arguments, sizes=TINY, start=parts.at_once)
    assert again["parts"] == record["parts"]
    assert capsys.readouterr().err.count("in the record") == 3


@pytest.mark.slow
def test_the_small_command_in_processes_of_its_own(tmp_path):
    """Minutes: ResNet-20, each part from a new process."""
    arguments = ["--small", "--folder", str(tmp_path), "--budget", "3000"]
    record = accelerator.main(arguments)
    entries = record["parts"]
    assert list(entries) == [part.name for part in accelerator.plan(accelerator.SMALL)]
    assert {
        name: e["why"] for name, e in entries.items() if e["status"] != "done"
    } == {}
    found = {name: entry["rows"] for name, entry in entries.items()}
    assert len(found["agreement"]) == 2 * len(CASES)
    for name, row in found["agreement"].items():
        assert row["agrees"]
        if "float32" in name:  # the same device: not a bit differs
            assert set(row["errors"].values()) == {0.0}
    for suffix in ("", ", largest batch"):
        check_steps(found[f"curvature{suffix}"], ["K-FAC", "SP-NGD"])
        check_steps(found[f"first order{suffix}"], ["LARS", "AdamW", "Muon", "NLCG"])
        check_shares(found[f"shares{suffix}"])
    check_steps(found["EKFAC"], ["K-FAC", "EKFAC"])
    assert {k: row["fits"] for k, row in found["largest batch"].items()} == {
        "8": True,
        "16": True,
    }
    assert found["first order, largest batch"]["SGD"]["batch_size"] == 16


# === Parts ============================================================================


def sleeps(run, *, seconds):
    run.report("before", {"x": 1})
    time.sleep(seconds)
    run.report("after", {})


def fails(run, *, how):
    run.report("before", {"x": 1})
    if how == "raise":
        raise KeyError("the reason")
    os._exit(3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("measure", "settings", "status", "why"),
    [
        (sleeps, {"seconds": 600.0}, "stopped", "limit"),
        (fails, {"how": "raise"}, "failed", "KeyError: 'the reason'"),
        (fails, {"how": "exit"}, "failed", "code 3"),
    ],
    ids=["too slow", "an error", "a crash"],
)
def test_a_part_that_does_not_end_well_keeps_its_rows(
    tmp_path, measure, settings, status, why
):
    rows = {}
    # The start of a process is part of it.
    part = parts.Part("some", measure, 40.0, settings)
    outcome = parts.in_own_process(part, run_of(rows, left=part.limit), tmp_path)
    assert outcome.status == status
    assert why in outcome.why
    assert rows == {"before": {"x": 1}}


def test_what_is_repeated_and_what_is_skipped(tmp_path):
    started = []

    def start(part, run, folder):
        del folder
        started.append(part.name)
        run.report("row", {"x": len(started)})
        return parts.Outcome("stopped" if part.name == "b" else "done")

    def carry_out(identity, budget=100.0, again=False):
        started.clear()
        parts.carry_out(
            [parts.Part(name, sleeps, 10.0, {"of": (1, 2)}) for name in "ab"],
            record,
            tmp_path,
            {"code": identity},
            budget=budget,
            again=again,
            start=start,
        )
        written = json.loads((tmp_path / "record.json").read_text())
        assert written == record
        return "".join(started)

    record = {}
    assert carry_out("x", budget=5.0) == ""
    assert record["parts"]["a"]["status"] == "skipped"
    assert "budget of 5 s" in record["parts"]["a"]["why"]
    assert carry_out("x") == "ab"
    record = json.loads(json.dumps(record))
    assert carry_out("x") == "b"  # it was stopped
    assert carry_out("x", budget=5.0) == ""
    assert record["parts"]["b"]["rows"] == {"row": {"x": 1}}  # what it had stays
    assert carry_out("x", again=True) == "ab"
    assert carry_out("y") == "ab"  # other code


# === The largest batch ================================================================


@pytest.mark.parametrize(
    ("limit", "tried"),
    # 10 bytes an example and 100 others: the device without a limit tries every size.
    [(None, [4, 8, 16, 32]), (600, [4, 16, 32]), (330, [4, 8, 16, 32])],
)
def test_the_batch_is_doubled_until_it_does_not_fit(monkeypatch, limit, tried):
    class Device:
        def memory_stats(self):
            return limit and {"bytes_limit": limit}

    def one_step(network, size):
        del network
        if size > 20:
            return accelerator_entrants.if_it_fits(exhausted) | {"fits": False}
        return {
            "fits": True,
            "bytes": {"total": 100 + 10 * size, "temporary": 10 * size},
        }

    def exhausted():
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating")

    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    monkeypatch.setattr(accelerator_steps, "_one_step", one_step)
    rows = {}
    sizes = {"batch_size": 4, "most": 512, "seconds": 1.0}
    accelerator_steps.largest_batch(run_of(rows), network=TINY.network, **sizes)
    assert [int(size) for size in rows] == tried
    found = parts.Run(rows.__setitem__, 0.0, {"largest batch": rows})
    assert accelerator_steps.largest(found) == 16
    with pytest.raises(parts.NotNeededError, match="no larger batch"):
        accelerator_steps.largest(run_of({}))


def test_other_errors_of_the_device_are_not_hidden():
    def fails():
        raise jax.errors.JaxRuntimeError("INTERNAL: a kernel failed")

    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        accelerator_entrants.if_it_fits(fails)


# === Agreement, inverses, shares ======================================================

QUICK, *OTHERS = CASES


@pytest.mark.parametrize(
    "name", [QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def test_sums_in_another_order_agree_and_wrong_results_do_not(name):
    results, others = {}, {}
    for dtype in ("float32", "bfloat16"):
        program, (params, probe, *batch) = accelerator_agreement.problem(
            CASES[name], dtype
        )
        program = jax.jit(program)
        results[dtype] = program(params, probe, *batch)
        others[dtype] = program(params, probe, *(x[::-1] for x in batch))
    single, half = results["float32"], results["bfloat16"]
    row = accelerator_agreement.compared(others["float32"], single)
    assert row["agrees"], row
    row = accelerator_agreement.compared(others["bfloat16"], single, half)
    assert row["agrees"], row
    for factor in (1.01, np.nan):  # a percent is no rounding of float32
        wrong = jax.tree.map(lambda x, f=factor: f * x, single["gradients"])
        row = accelerator_agreement.compared(single | {"gradients": wrong}, single)
        assert not row["agrees"]
    # Kernels whose inputs are in the wrong order: far beyond bfloat16.
    wrong = jax.tree.map(lambda x: x[::-1], half["updates"])
    row = accelerator_agreement.compared(half | {"updates": wrong}, single, half)
    assert not row["agrees"]


@pytest.mark.parametrize("method", accelerator_inverses.METHODS)
def test_inverses_are_those_of_numpy(method):
    packed = accelerator_inverses.matrices(2, 6)
    damping = jnp.full(2, accelerator_inverses.DAMPING)
    inverse = accelerator_inverses.METHODS[method](packed, damping)
    assert inverse.shape == (2, 6, 6)
    # Condition numbers of a few thousand, in float32.
    assert accelerator_inverses.error(inverse, packed) < 1e-3
    assert accelerator_inverses.error(1.01 * inverse, packed) == pytest.approx(
        0.01, rel=0.1
    )


def test_shares_are_differences():
    update = {"none": 3.0, "stats": 5.0, "full": 12.0}
    rows = {"gradient": {"median": 20.0}, "with statistics": {"median": 31.0}}
    found = accelerator_tables.parts_of_step(rows | {"update": update})
    assert found == {
        "loss and gradient": 20.0,
        "statistics": 11.0,
        "averaging": 2.0,
        "inversion": 7.0,
        "update": 3.0,
    }
