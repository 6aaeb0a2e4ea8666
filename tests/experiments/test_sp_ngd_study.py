"""The study's rules, its picture, and that its record is what the code says."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import sp_ngd_study
from experiments.side_by_side import Outcome


def outcome(**changed):
    values = {
        "accuracy": 0.5,
        "losses": [3.0, 2.0, 1.0, 1.0],
        "seconds": [9.0, 1.0, 2.0, 1.0],
        "renewals": {"conv.a": [0, 1], "conv.g": [0, 1, 2, 3], "norm.f": [0, 2]},
        "statistic_bytes": [30.0, 20.0, 10.0, 0.0],
        "curve": [(2, 0.4), (4, 0.5)],
    }
    return Outcome(**{**values, **changed})


def test_shares_are_counted_by_hand():
    assert outcome().refreshed() == 8 / 12
    np.testing.assert_allclose(
        sp_ngd_study.share_of_statistics(outcome()), [1, 2 / 3, 2 / 3, 1 / 3]
    )


@pytest.mark.parametrize(("accuracy", "step"), [(0.3, 2), (0.45, 4), (0.6, None)])
def test_steps_to_an_accuracy(accuracy, step):
    assert sp_ngd_study.steps_to(outcome(), accuracy) == step


def test_a_row_leaves_the_compiling_step_out_and_shares_add_up():
    sgd = outcome(seconds=[50.0, 1.0, 1.0, 0.0], renewals={}, statistic_bytes=[])
    seeds = [{"sgd": sgd, "stale": outcome()}, {"stale": outcome()}]
    plain, stale = sp_ngd_study.rows_of(seeds)
    assert plain["step_time_over_sgd"] == [1.0]
    assert "refreshed" not in plain
    assert stale["step_time_over_sgd"] == [2.0]
    assert stale["refreshed"] == [0.6667, 0.6667]
    assert stale["refreshed_by_quarter"] == [1.0, 0.667, 0.667, 0.333]
    assert stale["bytes"] == [0.5, 0.5]  # 15 a step, 30 where all is due
    alone = [{"sgd": sgd, "stale": outcome(statistic_bytes=[0.0] * 4)}]
    assert "bytes" not in sp_ngd_study.rows_of(alone)[1]


def test_the_picture_has_a_mark_for_every_renewal():
    fewer = outcome(renewals={"conv.a": [0], "conv.g": [0, 3], "norm.f": [0]})
    panels = sp_ngd_study.draw({256: outcome(), 1024: fewer}).axes
    marks = [
        [(row, x) for row, line in enumerate(p.lines) for x in line.get_xdata()]
        for p in panels
    ]
    assert marks[0] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 2)]
    assert marks[1] == [(0, 0), (1, 0), (1, 3), (2, 0)]
    assert panels[0].get_title() == (
        "batch 256: 67% of the statistics renewed, 50% of their bytes sent"
    )


def test_contestants_differ_in_the_optimizer_alone():
    for contestants in (
        sp_ngd_study.stale_contestants(1024, 1),
        sp_ngd_study.ablation_contestants(1),
        sp_ngd_study.tuning_contestants(
            sp_ngd_study.SGD_GRID, sp_ngd_study.SP_NGD_GRID, 1
        ),
    ):
        first = next(iter(contestants.values()))
        for config in contestants.values():
            same = {f.name for f in dataclasses.fields(config)}
            for name in same - {"optimizer", "sgd", "sp_ngd"}:
                assert getattr(config, name) == getattr(first, name)
    assert len(sp_ngd_study.SGD_GRID) == len(sp_ngd_study.SP_NGD_GRID) == 10


def test_the_committed_record_is_of_these_settings():
    record = json.loads(sp_ngd_study.RESULTS.read_text())
    assert record["steps"] == sp_ngd_study.STEPS >= 100
    assert list(record["stale"]) == [str(n) for n in sp_ngd_study.BATCH_SIZES]
    names = [row["name"] for row in record["ablation"]]
    assert names == list(sp_ngd_study.ablation_contestants(0))
    grids = (sp_ngd_study.SGD_GRID, sp_ngd_study.SP_NGD_GRID)
    tried = [row["name"] for row in record["tuned"] if row["seed"] == 0]
    assert tried == list(sp_ngd_study.tuning_contestants(*grids, 0))
    shares = [np.mean(rows[2]["refreshed"]) for rows in record["stale"].values()]
    assert shares == sorted(shares, reverse=True)  # larger batches renew less
