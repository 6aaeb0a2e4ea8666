"""The benchmark of stale statistics, whole, on a network that compiles in seconds.

Nothing is asserted of the times themselves.
"""

import json
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import contestants, renewals, reporting, stale_steps, timing, workloads
from lbopt import sharding
from lbopt.curvature.refresh import init_refresh

BATCH_SIZE = 16
STEPS = 10
EVERYTHING_IS_SIMILAR = 1e9
# Then statistics are renewed at these steps, by the Fibonacci numbers.
RENEWALS = (0, 1, 2, 4, 7)


@pytest.fixture(scope="module")
def workload():
    return workloads.tiny(BATCH_SIZE)


@pytest.fixture(scope="module")
def setup(workload):
    return contestants.set_up(workload)


@pytest.fixture(scope="module")
def units(setup):
    return sharding.units_of(sharding.configured(setup.layers.preconditioned))


class Run(NamedTuple):
    record: dict
    written: dict
    first: Any  # state of the stale one's transform after the first step


@pytest.fixture(scope="module")
def run(setup, tmp_path_factory):
    path = tmp_path_factory.mktemp("stale") / "record.json"
    arguments = ["--workload", "tiny", "--batch-size", str(BATCH_SIZE)]
    arguments += ["--steps", str(STEPS)]
    arguments += ["--threshold", str(EVERYTHING_IS_SIMILAR), "--label-noise", "0"]
    arguments += ["--output", str(path)]
    states = []
    turns = timing.turns

    def watched(*args):
        for turn in turns(*args):
            if (turn.name, turn.index) == ("SP-NGD stale", 0):
                states.append(jax.device_get(turn.state.opt_state[0]))
            yield turn

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "turns", watched)
        patch.setattr(contestants, "set_up", lambda workload: setup)
        record = stale_steps.main(arguments)
    return Run(record, json.loads(path.read_text("utf-8")), *states)


def by_name(record):
    return {c["name"]: c for c in record["contestants"]}


# ------------------------------------------------------------------ the whole command


def test_the_command_writes_its_record(run):
    record = run.record
    assert run.written == record
    assert {"processor", "cores", "versions", "date"} <= record.keys()
    assert record["command"].startswith("python -m benchmarks.stale_steps --workload")
    assert record["settings"]["sp_ngd_rate"] == stale_steps.SP_NGD_RATE
    assert list(by_name(record)) == ["SGD", "SP-NGD never stale", "SP-NGD stale"]
    for contestant in record["contestants"]:
        assert len(contestant["seconds"]) == len(contestant["losses"]) == STEPS
        assert min(contestant["seconds"]) > 0
        assert contestant["losses"][-1] < contestant["losses"][0]
        assert contestant["compile_seconds"] > 0
    json.dumps(record, allow_nan=False)


def test_all_start_from_the_same_loss_on_the_same_batches(run):
    sgd, never, stale = (c["losses"] for c in run.record["contestants"])
    assert never[0] == pytest.approx(sgd[0], rel=1e-4)
    # Both renewed everything at the first three steps.
    assert stale[:4] == pytest.approx(never[:4], rel=1e-3)
    assert stale[5:] != pytest.approx(never[5:], rel=1e-3)


def test_ratios_divide_steps_of_the_same_part(run):
    record = run.record
    sgd, never, stale = record["contestants"]
    assert "parts" not in sgd
    for runner in (never, stale):
        for part, start in (("steady", STEPS // 2), ("whole", 1)):
            own, base = runner["seconds"][start:], sgd["seconds"][start:]
            total = runner["parts"][part]["total"]
            assert total["median"] == pytest.approx(sum(own) / sum(base))
            for spread in (total, runner["parts"][part]["paired"]):
                assert 0 < spread["low"] <= spread["median"] <= spread["high"]


def test_shares_are_those_of_the_clocks(run):
    runners = by_name(run.record)
    for part, steps in (("steady", range(5, 10)), ("whole", range(1, 10))):
        never = runners["SP-NGD never stale"]["parts"][part]["shares"]
        assert list(never) == ["statistics", "numbers", "inversions", "work"]
        for share in never.values():
            assert share == {"A": 1, "G": 1, "F": 1, "all": 1}
        due = sum(step in RENEWALS for step in steps) / len(steps)
        for share in runners["SP-NGD stale"]["parts"][part]["shares"].values():
            assert share == pytest.approx(dict.fromkeys(never["work"], due))


def test_the_table_names_all(run):
    printed = stale_steps.table(run.record)
    for name in ("SGD", "SP-NGD never stale", "SP-NGD stale: work", "median of steps"):
        assert name in printed
    assert "SP-NGD stale: statistics         20.0%" in printed
    assert "NOT" not in printed


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "1"],
        ["--batch-size", "0"],
        ["--label-noise", "2"],
        ["--workload", "autoencoder"],
    ],
)
def test_a_bad_setting_is_refused_at_once(arguments, capsys):
    with pytest.raises(SystemExit):
        stale_steps.main(arguments)
    assert arguments[0] in capsys.readouterr().err


# -------------------------------------------------------------------------- its parts


def test_ratios_of_given_times():
    # Every tenth step is ten times as long, on a machine that slows down.
    base = [1.0] * 50 + [3.0] * 50
    own = [2 * b * (10 if i % 10 == 0 else 1) for i, b in enumerate(base)]
    ratios = timing.stretched_ratios(own, base)
    assert ratios["total"] == {"median": 3.8, "low": 3.8, "high": 3.8}
    assert ratios["paired"] == {"median": 2, "low": 2, "high": 2}
    own[:10] = [5.0] * 10
    ratios = timing.stretched_ratios(own, base)
    assert ratios["total"] == {"median": 3.86, "low": 3.8, "high": 5}
    assert ratios["paired"] == {"median": 2, "low": 2, "high": 5}
    few = timing.stretched_ratios([4.0, 9.0], [2.0, 3.0])
    assert few["paired"] == {"median": 2.5, "low": 2, "high": 3}


def test_the_first_step_renews_everything_that_its_report_counts(run, units):
    state = run.first
    whole = renewals.everything(units)
    renewed = renewals.at_step(units, state.refresh, 0)
    np.testing.assert_array_equal(renewed, whole)
    np.testing.assert_array_equal(renewed.statistics, state.report.statistics)
    assert renewed.inversions.sum() == state.report.inversions
    numbers = sum(x.size for x in jax.tree.leaves(state.factors))
    assert renewed.numbers.sum() == numbers
    # Inputs: 27 in the stem, 36 and 36 in the block, 4 and a bias in the head.
    assert whole.work[0] == 27**3 + 2 * 36**3 + 5**3
    assert whole.work[1] == 3 * 4**3 + 3**3


def test_what_was_renewed_at_another_step_does_not_count(units):
    statistics = 1 + max(unit.statistic for unit in units)
    clocks = init_refresh(statistics, len(units))
    clocks = clocks._replace(
        statistic_step=clocks.statistic_step.at[0].set(3).at[1].set(2),
        inverse_step=clocks.inverse_step.at[-1].set(3),
    )
    renewed = renewals.at_step(units, clocks, 3)
    assert renewed.statistics.sum() == renewed.inversions.sum() == 1
    assert renewed.work.sum() == units[-1].factor.work
    copies = sum(unit.statistic == 0 for unit in units)
    assert renewed.numbers.sum() == copies * units[0].factor.size
    whole = renewals.everything(units)
    half = renewals.shares(units, [whole, renewals.at_step(units, clocks, 9)])
    assert half["work"] == {"A": 0.5, "G": 0.5, "F": 0.5, "all": 0.5}


def test_kinds_that_a_model_lacks_are_left_out(units):
    dense = [unit for unit in units if unit.kind in ("a", "g")]
    shares = renewals.shares(dense, [renewals.everything(dense)])
    assert list(shares["work"]) == ["A", "G", "all"]


def check_samples(workload):
    """They are like the batch, differ, and come again for the same key."""
    one, other, again = (workload.sample(jax.random.key(i)) for i in (7, 8, 7))
    shapes = jax.tree.map(jnp.shape, workload.batch)
    assert jax.tree.map(jnp.shape, one) == shapes
    assert not jnp.array_equal(one["inputs"], other["inputs"])
    assert jax.tree.all(jax.tree.map(jnp.array_equal, one, again))


def test_pictures_are_sampled(workload):
    check_samples(workload)


def test_codes_are_sampled():
    check_samples(workloads.autoencoder(sizes=(12, 6, 3), batch_size=5))


def test_label_noise_exchanges_labels(workload):
    def sample(rng):
        labels = jax.random.randint(rng, (300,), 0, 3)
        return {"inputs": jax.random.normal(rng, (300,)), "targets": labels}

    workload = workload._replace(sample=sample)
    clean, half, wrong = (
        stale_steps.fresh(workload, share)(5) for share in (0.0, 0.5, 1.0)
    )
    assert jnp.array_equal(clean["inputs"], wrong["inputs"])
    changed = [np.mean(b["targets"] != clean["targets"]) for b in (half, wrong)]
    # Two thirds of the others' labels differ where there are three classes.
    assert changed == pytest.approx([1 / 3, 2 / 3], abs=0.1)
    counts = [np.bincount(b["targets"]).tolist() for b in (clean, wrong)]
    assert counts[0] == counts[1]
    other = stale_steps.fresh(workload, 0.0)(6)
    assert not jnp.array_equal(clean["inputs"], other["inputs"])
    assert not jnp.array_equal(clean["targets"], other["targets"])


def test_turns_give_everybody_the_same_batches():
    """Two contestants that note what they get, in both orders."""
    seen = []

    def step(state, batch, index):
        seen.append((state, batch, index))
        return state, jnp.asarray(batch)

    runners = [
        timing.Contestant(name, step, name, False, 0.0, 1.0, 0, 0) for name in "ab"
    ]
    turns = list(timing.turns(runners, lambda index: 10.0 * index, 3))
    assert [(t.name, t.index, t.loss) for t in turns] == [
        *(("a", 0, 0.0), ("b", 0, 0.0)),
        *(("b", 1, 10.0), ("a", 1, 10.0)),
        *(("a", 2, 20.0), ("b", 2, 20.0)),
    ]
    assert [s[1:] for s in seen] == [(10.0 * t.index, t.index) for t in turns]


def test_costs_say_whether_training_works():
    base = {"name": "x", "setup_seconds": 0.0, "compile_seconds": 2.0}
    base |= {"state_bytes": 10**6, "temporary_bytes": 0}
    courses = ([2.0, 1.0], [1.0, 2.0], [2.0, math.nan, 1.0])
    lines = reporting.costs([base | {"losses": losses} for losses in courses])
    assert re.search(r" 2\.0 \(1\.0×\) +1\.0 +0\.0 +2\.000 → 1\.000$", lines[1])
    assert lines[2].endswith("NOT FALLING")
    assert lines[3].endswith("NOT FINITE")
