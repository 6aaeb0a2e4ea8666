"""The study of three factors: its rules, its rows, its picture, and it in miniature."""

import dataclasses
import functools
import json
import math

import numpy as np
import pytest

from experiments import doubly_factored_study as study
from experiments import side_by_side
from experiments.data import pipeline
from experiments.models import convnet, registry
from experiments.settings import Config, Kfac, Sgd
from experiments.side_by_side import Outcome


def outcome(losses):
    return Outcome(0.5, losses, [9.0] + [2.0] * (len(losses) - 1), {}, [])


def falling(last_step, end=1.0):
    """A loss of 3 until a step, a lower one from it on."""
    return outcome([3.0] * (last_step - 1) + [end] * (20 - last_step))


TRIED = {
    "SGD rate 0.1": outcome([3.0, 2.0, 1.0, 1.0, 1.0, 9.0]),  # the lowest is before it
    "SGD rate 0.2": falling(12),
    "full factor rate 0.1 damping 0.01": falling(5, 0.5),
    "full factor rate 0.03 damping 0.01": falling(9, 0.4),
    "three factors rate 0.1 damping 0.01": falling(4, 0.6),
    "three factors rate 0.03 damping 0.01": outcome([math.nan] * 20),
}
CHOSEN = {
    "SGD": "SGD rate 0.2",
    "full factor": "full factor rate 0.03 damping 0.01",
    "three factors": "three factors rate 0.1 damping 0.01",
}


def test_contestants_differ_in_the_optimizer_alone():
    configs = study.contestants(seed=2)
    assert len(configs) == 3 * 4
    first = next(iter(configs.values()))
    may_differ = {"optimizer", "sgd", "kfac", "doubly_factored"}
    for config in configs.values():
        for field in dataclasses.fields(Config):
            if field.name not in may_differ:
                assert getattr(config, field.name) == getattr(first, field.name)
    assert (first.seed, first.fisher, first.kfac.inverse_period) == (2, "sampled", 5)
    assert first.epochs * 10_240 / first.batch_size == study.UPDATES


def test_both_curvatures_get_the_same_settings():
    configs = study.contestants(seed=0).values()
    settings = {
        rows: [
            x.kfac
            for x in configs
            if (x.optimizer, x.doubly_factored) == ("kfac", rows)
        ]
        for rows in study.CURVATURES.values()
    }
    full, three = settings.values()
    assert full == three
    assert len(full) == sum(x.optimizer == "sgd" for x in configs) == 4


def test_the_lowest_loss_at_the_end_is_chosen():
    assert study.chosen(TRIED) == CHOSEN


def test_rows_count_to_the_last_loss_of_sgd():
    names = list(CHOSEN.values())
    rows = study.rows_of({name: TRIED[name] for name in names}, CHOSEN)
    assert [row["name"] for row in rows] == names
    assert [row["loss"] for row in rows] == [1.0, 0.4, 0.6]
    # Means of four losses; while one of the four is 3 still, all are above 1.
    assert [row["updates"] for row in rows] == [15, 12, 7]
    assert [row["seconds"] for row in rows] == [30.0, 24.0, 14.0]
    assert [row["step_time"] for row in rows] == [2.0] * 3


@pytest.fixture
def unread(monkeypatch):
    """Data of the right shapes, and nothing to read."""
    data = pipeline.Data(None, None, (16, 16, 3), 20, 20.0)  # type: ignore[arg-type]
    monkeypatch.setattr(study, "open_data", lambda config: data)


def bytes_of(orders):
    """A triangle and an inverse of each, in float32."""
    return sum(4 * (n * (n + 1) // 2 + n * n) for n in orders)


@pytest.mark.parametrize(
    ("kind", "hidden"),
    [
        ("full factor", {"a": 1025, "g": 128}),
        ("three factors", {"k": 16, "c": 64, "g": 128, "bias": 128}),
    ],
)
def test_only_the_hidden_layer_has_other_factors(kind, hidden, unread, capsys):
    named = study.contestants(seed=0).items()
    config = next(config for name, config in named if name.startswith(kind))
    found = study.curvature_of(config)
    rows = {
        "conv1": {"a": 5 * 5 * 3 + 1, "g": 16},
        "conv2": {"a": 5 * 5 * 16 + 1, "g": 64},
        "head": {"a": 129, "g": 20},
        "hidden": hidden,
    }
    assert found["rows"] == rows
    orders = [n for layer in rows.values() for n in layer.values()]
    assert found["bytes"] == bytes_of(orders)
    assert not capsys.readouterr().out


def test_the_picture_has_means_and_every_seed():
    by_seed = {
        kind: [falling(5, 1.0 + i), falling(5, 2.0 + i)]
        for i, kind in enumerate(CHOSEN)
    }
    (panel,) = study.draw(by_seed).axes
    assert len(panel.lines) == 3 * (1 + 2)
    for i in range(3):
        mean, *seeds = panel.lines[3 * i : 3 * i + 3]
        points = [np.asarray(line.get_xydata()) for line in (mean, *seeds)]
        ends = [x[-1].tolist() for x in points]
        assert ends == [[19, 1.5 + i], [19, 1.0 + i], [19, 2.0 + i]]
        assert points[0][0, 0] == 4  # the first mean of four updates
        assert {line.get_color() for line in seeds} == {mean.get_color()}
        assert all(x.get_linewidth() < mean.get_linewidth() for x in seeds)
    _, labels = panel.get_legend_handles_labels()
    assert labels == ["SGD", "K-FAC, full factor", "K-FAC, three factors"]


# === In miniature =====================================================================


def compiled_once(build_program):
    """One program for runs that differ in the seed alone, which is then of the data."""
    programs = {}

    def build(config, data):
        key = dataclasses.replace(config, seed=0)
        if key not in programs:
            programs[key] = build_program(config, data)
        return programs[key]

    return build


@pytest.fixture(scope="module")
def carried_out(tmp_path_factory):
    """The record of a study of one setting each, and where its files are."""
    directory = tmp_path_factory.mktemp("study")
    base = study.configure(seed=0)
    tiny = dataclasses.replace(
        base,
        dataset="strokes/tiny",
        data_dir=directory / "data",
        batch_size=64,
        epochs=1.5,
        eval_epochs=1.5,
        eval_batch_size=100,
    )
    # As few convolutions as can be, and a map of 64 locations × 8 channels.
    model = functools.partial(convnet.ConvNet, channels=(8,), hidden=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.MODELS, "convnet_wide", model)
        once = compiled_once(side_by_side.build_program)
        patch.setattr(side_by_side, "build_program", once)
        patch.setattr(
            study, "configure", lambda seed: dataclasses.replace(tiny, seed=seed)
        )
        patch.setattr(study, "BATCH_SIZE", 64)
        patch.setattr(study, "SEEDS", (1,))
        patch.setattr(study, "SGD_GRID", [Sgd(learning_rate=0.01)])
        patch.setattr(study, "KFAC_GRID", [Kfac(learning_rate=0.03, damping=0.1)])
        patch.setattr("experiments.kfac_batch_study.AVERAGED_IMAGES", 128)
        patch.setattr(study, "AVERAGED_IMAGES", 128)
        patch.setattr(study, "RUNS", directory / "runs")
        patch.setattr(study, "RESULTS", directory / "results" / "record.json")
        patch.setattr(study, "FIGURE", directory / "figures" / "picture.png")
        record = study.study()
        # A second time nothing is trained.
        patch.setattr(side_by_side, "train_together", None)
        assert study.study() == record
    return record, directory


@pytest.mark.slow
def test_the_study_writes_its_record_and_its_picture(carried_out):
    record, directory = carried_out
    assert json.loads((directory / "results" / "record.json").read_text()) == record
    assert (directory / "figures" / "picture.png").stat().st_size > 10_000
    files = {path.name for path in (directory / "runs").iterdir()}
    assert files == {"seed0.json", "seed1.json"}


@pytest.mark.slow
def test_the_record_compares_all_three_by_seed(carried_out):
    record, _ = carried_out
    names = ["SGD rate 0.01"]
    names += [f"{kind} rate 0.03 damping 0.1" for kind in study.CURVATURES]
    assert [row["name"] for row in record["tried"]] == names
    compared = record["compared"]
    assert [(row["seed"], row["name"]) for row in compared] == [(1, x) for x in names]
    assert all(0 < row["loss"] < 3 for row in compared)
    assert compared[0]["updates"] <= 6
    kinds = record["curvature"]
    assert kinds["three factors"]["bytes"] < kinds["full factor"]["bytes"] / 4


@pytest.mark.slow
def test_the_curvatures_part_after_the_first_update(carried_out):
    kept = json.loads((carried_out[1] / "runs" / "seed1.json").read_text())
    sgd, full, three = (x["losses"] for x in kept.values())
    assert sgd[0] == pytest.approx(full[0], rel=1e-6)
    assert full[0] == pytest.approx(three[0], rel=1e-6)
    assert abs(full[-1] - three[-1]) > 1e-6
    hidden = [
        {x for x in outcome["renewals"] if x.startswith("hidden")}
        for outcome in kept.values()
    ]
    assert hidden == [
        set(),
        {"hidden.a", "hidden.g"},
        {"hidden.k", "hidden.c", "hidden.g", "hidden.bias"},
    ]


# === The setting that the study brought ===============================================


@pytest.mark.parametrize("value", [0, -1])
def test_no_rows_are_refused(value):
    with pytest.raises(
        ValueError, match=f"doubly_factored must be .*none, got {value}"
    ):
        Config(doubly_factored=value)
