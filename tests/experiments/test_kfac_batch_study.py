"""The study of K-FAC by batch size: its rules, its table, its picture."""

import dataclasses

import pytest

from experiments import kfac_batch_study as study
from experiments import optimizers, side_by_side
from experiments.data import pipeline
from experiments.settings import Config, Kfac
from experiments.side_by_side import Outcome


def outcome(losses):
    return Outcome(0.5, losses, [9.0] + [2.0] * (len(losses) - 1), {}, [])


@pytest.mark.parametrize("size", study.UPDATES)
def test_contestants_differ_in_the_optimizer_alone(size):
    configs = study.contestants(size)
    optimizers = [config.optimizer for config in configs.values()]
    assert optimizers.count("sgd") == optimizers.count("kfac") == len(configs) / 2
    first = next(iter(configs.values()))
    same = {f.name for f in dataclasses.fields(Config)} - {"optimizer", "sgd", "kfac"}
    for config in configs.values():
        assert all(getattr(config, k) == getattr(first, k) for k in same)
        assert (config.batch_size, config.fisher) == (size, "sampled")
    steps_per_epoch = study.TRAINING_IMAGES / size
    assert round(first.epochs * steps_per_epoch) == study.UPDATES[size]


def test_step_sizes_get_as_many_settings():
    configs = study.step_sizes()
    bounded = [c for c in configs.values() if c.kfac.kl_clip is not None]
    assert len(bounded) == len(configs) / 2
    assert all(c.decay_rate == 1 for c in bounded)
    free = [c for c in configs.values() if c.kfac.kl_clip is None]
    assert all(c.decay_rate < 1 for c in free)
    assert {c.kfac.damping for c in configs.values()} == {study.ABLATION_DAMPING}


def test_losses_are_means_over_as_many_images():
    assert study.averaged(outcome([4.0, 2.0, 1.0]), 2048) == [4.0, 2.0, 1.0]
    assert study.averaged(outcome([4.0, 2.0, 1.0]), 1024) == [3.0, 1.5]
    assert study.averaged(outcome([2.0] * 8 + [10.0]), 256) == [2.0, 3.0]
    assert study.last_loss(outcome([1.0, float("nan")]), 2048) == float("inf")


@pytest.mark.parametrize(
    ("size", "loss", "updates"), [(2048, 2.0, 2), (1024, 2.0, 3), (1024, 1.0, None)]
)
def test_updates_to_a_loss(size, loss, updates):
    assert study.updates_to(outcome([4.0, 2.0, 1.0]), size, loss) == updates


def test_a_row_counts_seconds_with_compilation_apart():
    row = study.row_of("x", outcome([4.0, 2.0, 1.0]), 2048, 1.0)
    assert (row["updates"], row["seconds"], row["step_time"]) == (3, 6.0, 2.0)
    assert study.row_of("x", outcome([4.0, 2.0]), 2048, 1.0)["seconds"] is None


def falling(last_step):
    """A loss of 3 until a step, of 1 from it on."""
    return outcome([3.0] * (last_step - 1) + [1.0] * 20)


@pytest.fixture
def by_size():
    return {
        64: {"sgd a": outcome([3.0] * 99), "kfac a": falling(93)},
        256: {"sgd a": falling(60), "sgd b": falling(40), "kfac a": falling(33)},
        1024: {"sgd a": falling(30), "sgd b": falling(35), "kfac a": falling(9)},
        2048: {"sgd a": outcome([3.0] * 9), "kfac a": falling(5)},
    }


def test_speed_ups_are_over_the_base_batch(by_size):
    loss = study.target_of("sgd", by_size[256])
    assert loss == 1.0
    rows = study.scaling(by_size, loss)
    # Two and thirty, eight, two and one updates below 1 are averaged over.
    assert [row["updates"] for row in rows[:4]] == [None, 47, 31, None]
    assert [row["updates"] for row in rows[4:]] == [None, 40, 10, 5]
    assert [row["speed_up"] for row in rows[:4]] == [None, 1.0, 1.52, None]
    assert [row["speed_up"] for row in rows[4:]] == [None, 1.0, 4.0, 8.0]
    assert [row["ideal"] for row in rows] == [0.25, 1, 4, 8] * 2
    assert rows[1]["name"] == "sgd b"


def test_targets_are_the_ends_at_the_base_batch():
    base = {"sgd a": outcome([2.0] * 9), "sgd b": outcome([1.5] * 9)}
    base["kfac a"] = outcome([0.5] * 9)
    assert study.target_of("sgd", base) == 1.5
    assert study.target_of("kfac", base) == 0.5


def test_the_picture_has_what_reached_the_targets_and_the_ideals(by_size):
    targets = {
        kind: {"loss": loss, "scaling": study.scaling(by_size, loss)}
        for kind, loss in (("sgd", 1.0), ("kfac", 0.5))
    }
    left, right = study.draw(targets).axes
    sgd, _, kfac, ideal = left.lines
    assert list(sgd.get_xdata()) == [256, 1024]  # never at 64 and at 2,048
    assert list(kfac.get_xdata()) == [256, 1024, 2048]
    assert list(kfac.get_ydata()) == [40, 10, 5]
    assert list(ideal.get_ydata()) == [160, 40, 10, 5]
    assert not any(len(line.get_xdata()) for line in right.lines)
    assert "SGD's end at 256, 1.00 nats" in left.get_title()


def test_the_ablation_names_the_best_of_each_step_size():
    outcomes = {"kl a": falling(9), "kl b": falling(7), "rate a": falling(8)}
    record = study.ablation(outcomes, 1.0)
    assert record["best"] == {"kl": "kl b", "rate": "rate a"}
    assert [row["name"] for row in record["tried"]] == list(outcomes)


def test_what_is_finished_is_not_repeated(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RUNS", tmp_path)
    once = {"sgd": outcome([2.0, 1.0])}
    monkeypatch.setattr(side_by_side, "train_together", lambda configs: once)
    assert study.outcomes_of("256", study.contestants(256)) == once
    monkeypatch.setattr(side_by_side, "train_together", None)
    assert study.outcomes_of("256", study.contestants(256)) == once


# === Settings that the study brought ==================================================


class Images(pipeline.Data):
    """Ten steps an epoch, and nothing to read."""

    def __init__(self):
        super().__init__(*[None] * 2, (16, 16, 3), 5, 10.0)  # type: ignore[arg-type]


def test_an_exponential_schedule_falls_by_half_epochs():
    config = dataclasses.replace(study.configure(1024), decay_rate=0.5)
    rate = optimizers.build_schedule(config, Images(), 0.8)
    values = [float(rate(k)) for k in (0, 4, 5, 9, 10)]
    assert values == pytest.approx([0.8, 0.8, 0.4, 0.4, 0.2])


@pytest.mark.parametrize("value", [0.0, 1.5])
def test_decays_out_of_range_are_refused(value):
    with pytest.raises(ValueError, match=r"decay_rate must be in \(0, 1\]"):
        Config(decay_rate=value)
    with pytest.raises(ValueError, match=r"kfac.kl_clip_decay must be in \(0, 1\]"):
        Config(kfac=Kfac(kl_clip_decay=value))


def test_the_bound_of_the_kl_step_falls_by_half_epochs(monkeypatch):
    passed = {}
    monkeypatch.setattr(
        optimizers.lbopt, "kfac", lambda rate, layers, **settings: passed | settings
    )
    monkeypatch.setattr(optimizers.lbopt, "trace_layers", lambda *a, **k: "layers")
    kfac = Kfac(kl_clip=0.4, kl_clip_decay=0.5)
    config = dataclasses.replace(study.configure(1024), kfac=kfac)
    settings, _ = optimizers.build_optimizer(config, Images(), lambda: None, (), 1)
    bound = settings["kl_clip"]
    assert [float(bound(k)) for k in (0, 4, 5, 10)] == pytest.approx(
        [0.4, 0.4, 0.2, 0.1]
    )
    constant = dataclasses.replace(config, kfac=Kfac(kl_clip=0.4))
    settings, _ = optimizers.build_optimizer(constant, Images(), lambda: None, (), 1)
    assert settings["kl_clip"] == 0.4
