"""The benchmark of stale statistics."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import contestants, stale_steps, timing
from benchmarks.workloads import tiny
from lbopt import sharding
from lbopt.curvature import layer_table

pytestmark = pytest.mark.slow
STEPS = 10
EVERYTHING_IS_SIMILAR = 1e9
# Then statistics are renewed at these steps, by the Fibonacci numbers.
RENEWALS = (0, 1, 2, 4, 7)
NEVER, STALE = "SP-NGD never stale", "SP-NGD stale"


@pytest.fixture(scope="module")
def units(setup):
    return sharding.units_of(layer_table.configured(setup.layers.preconditioned))


@pytest.fixture(scope="module")
def run(setup, run_command):
    """The record, and the stale transform's state after the first step."""
    states = []
    race = timing.race

    def watched(*args, watch):
        def both(name, index, state):
            if (name, index) == (STALE, 0):
                states.append(jax.device_get(state.opt_state[0]))
            watch(name, index, state)

        return race(*args, watch=both)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "race", watched)
        patch.setattr(contestants, "set_up", lambda workload: setup)
        record = run_command(
            stale_steps.main,
            *("--batch-size", "16", "--steps", str(STEPS)),
            make=tiny,
            threshold=EVERYTHING_IS_SIMILAR,
            label_noise=0.0,
        )
    return record, states[0]


def test_all_train_from_the_same_loss_on_the_same_batches(run, check_contestants):
    entries = run[0]["contestants"]
    check_contestants(entries, ["SGD", NEVER, STALE], steps=STEPS, warm_up=0)
    _, never, stale = (e["losses"] for e in entries)
    # Both renewed everything at the first three steps.
    assert stale[:4] == pytest.approx(never[:4], rel=1e-3)
    assert stale[5:] != pytest.approx(never[5:], rel=1e-3)


def test_parts_have_the_ratios_of_their_steps_and_shares_of_the_clocks(run):
    sgd, never, stale = run[0]["contestants"]
    assert "parts" not in sgd
    for part, steps in (("steady", range(5, 10)), ("whole", range(1, 10))):
        for runner in (never, stale):
            own, base = (e["seconds"][steps.start :] for e in (runner, sgd))
            total = runner["parts"][part]["total"]
            assert total["median"] == pytest.approx(sum(own) / sum(base))
            for spread in (total, runner["parts"][part]["paired"]):
                assert 0 < spread["low"] <= spread["median"] <= spread["high"]
        whole = never["parts"][part]["shares"]
        assert list(whole) == ["statistics", "numbers", "inversions", "work"]
        for share in whole.values():
            assert share == {"A": 1, "G": 1, "F": 1, "all": 1}
        due = sum(step in RENEWALS for step in steps) / len(steps)
        for share in stale["parts"][part]["shares"].values():
            assert share == pytest.approx(dict.fromkeys(whole["work"], due))
    printed = stale_steps.table(run[0])
    for name in ("SGD", NEVER, f"{STALE}: work", "median of steps"):
        assert name in printed
    assert f"{STALE}: statistics         20.0%" in printed
    assert "NOT" not in printed


def test_the_first_step_renews_everything_that_its_report_counts(run, units):
    record, state = run
    whole = stale_steps.everything(units)
    renewed = record["contestants"][2]["renewed"][0]
    assert renewed == whole
    assert renewed["statistics"] == state.report.statistics.tolist()
    assert sum(renewed["inversions"]) == state.report.inversions
    numbers = sum(x.size for x in jax.tree.leaves(state.factors))
    assert sum(renewed["numbers"]) == numbers
    # Inputs: 27 in the stem, 36 and 36 in the block, 4 and a bias in the head.
    assert whole["work"][0] == 27**3 + 2 * 36**3 + 5**3
    assert whole["work"][1] == 3 * 4**3 + 3**3


def test_units_are_weighed_by_their_size_and_work(units):
    measured = np.zeros(1 + max(unit.statistic for unit in units), bool)
    inverted = np.zeros(len(units), bool)
    none = stale_steps.amounts(units, measured, inverted)
    measured[0] = inverted[-1] = True
    renewed = stale_steps.amounts(units, measured, inverted)
    assert sum(renewed["statistics"]) == sum(renewed["inversions"]) == 1
    assert sum(renewed["work"]) == units[-1].factor.work
    copies = sum(unit.statistic == 0 for unit in units)
    assert sum(renewed["numbers"]) == copies * units[0].factor.size
    half = stale_steps.shares(units, [stale_steps.everything(units), none])
    assert half["work"] == {"A": 0.5, "G": 0.5, "F": 0.5, "all": 0.5}


def test_kinds_that_a_model_lacks_are_left_out(units):
    dense = [unit for unit in units if unit.kind in ("a", "g")]
    shares = stale_steps.shares(dense, [stale_steps.everything(dense)])
    assert list(shares["work"]) == ["A", "G", "all"]


def test_label_noise_exchanges_labels():
    def sample(rng):
        labels = jax.random.randint(rng, (300,), 0, 3)
        return {"inputs": jax.random.normal(rng, (300,)), "targets": labels}

    workload = tiny()._replace(sample=sample)
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
