"""The study's rules, and that its committed record is what the code says."""

import dataclasses
import json

import pytest

from experiments import demo_study
from experiments.figures import Curve


def test_both_optimizers_get_the_same_number_of_settings():
    assert len(demo_study.SGD) == len(demo_study.KFAC) >= 6


@pytest.mark.parametrize(("accuracy", "step"), [(0.1, 2), (0.5, 4), (0.9, None)])
def test_steps_to_an_accuracy(accuracy, step):
    curve = Curve(steps=[2, 4, 6], seconds=[1.0, 2.0, 3.0], values=[0.2, 0.6, 0.5])
    assert demo_study.steps_to(curve, accuracy) == step


def test_runs_differ_in_the_optimizer_and_the_seed_alone():
    sgd = demo_study.configure(demo_study.SGD[0], 1)
    kfac = demo_study.configure(demo_study.KFAC[0], 1)
    same = {"optimizer", "directory", "sgd", "kfac"}
    for field in dataclasses.fields(sgd):
        if field.name not in same:
            assert getattr(sgd, field.name) == getattr(kfac, field.name)
    assert (sgd.batch_size, sgd.seed) == (2048, 1)


def test_the_committed_record_is_of_these_settings():
    record = json.loads(demo_study.RESULTS.read_text())
    for name in ("SGD", "KFAC"):
        rows = record[f"{name.lower()}_settings"]
        for row, settings in zip(rows, getattr(demo_study, name), strict=True):
            # A setting that came after the runs had its default in them.
            row = {**dataclasses.asdict(type(settings)()), **row}
            assert dataclasses.asdict(settings).items() <= row.items()
    assert len(record["seeds"]) == len(demo_study.SEEDS)
    crossings = [seed["kfac"]["steps_to_sgd"] for seed in record["seeds"]]
    assert record["mean_steps_to_sgd"] == pytest.approx(sum(crossings) / 3)
