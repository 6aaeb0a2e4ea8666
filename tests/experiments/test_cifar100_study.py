"""The study of batch sizes: its settings, its choice, its table, its picture."""

import dataclasses
import json

import pytest

from experiments import cifar100_study as study
from experiments.side_by_side import Outcome


def test_rates_are_the_paper_s_and_their_multiples():
    # 0.1 for a batch of 256; LARS by the root.
    assert study.smallest_rate("NLCG", 2560) == pytest.approx(1.0)
    assert study.smallest_rate("momentum SGD", 640) == pytest.approx(0.25)
    assert study.smallest_rate("LARS", 2560) == pytest.approx(10.0)
    assert study.smallest_rate("LARS after K-FAC", 160) == pytest.approx(2.5)
    config = study.configure("RMSProp", 160, 8, seed=2)
    assert config.rmsprop.learning_rate == pytest.approx(0.5)
    assert (config.batch_size, config.seed) == (160, 2)


def test_the_largest_batch_is_a_quarter_of_the_images():
    assert study.LARGEST / 10_240 >= 0.25


def test_contestants_differ_in_the_optimizer_alone():
    names = (*study.BASELINES, *study.WITH_KFAC)
    configs = {n: study.configure(n, study.LARGEST, 2, seed=0) for n in names}
    same = {
        name: {
            key: value
            for key, value in dataclasses.asdict(config).items()
            if key not in ("optimizer", "nlcg", "lars", "rmsprop", "sgd")
        }
        for name, config in configs.items()
    }
    assert all(settings == same["NLCG"] for settings in same.values())
    optimizers = [config.optimizer for config in configs.values()]
    assert optimizers == ["nlcg", "lars", "rmsprop", "sgd", "nlcg", "lars"]
    curved = [name for name, config in configs.items() if config.has_curvature]
    assert curved == list(study.WITH_KFAC)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Files of runs: accuracy 0.1 × factor, and 0.3, 0.35 with other seeds."""
    monkeypatch.setattr(study, "RUNS", tmp_path)

    def write(name, outcomes):
        kept = {key: dataclasses.asdict(x) for key, x in outcomes.items()}
        (tmp_path / f"{name}.json").write_text(json.dumps(kept))

    def outcome(accuracy):
        return Outcome(accuracy, [3.0, 2.0, 1.0, 0.0], [1.0] * 4, {}, [])

    by_rate = {"1": outcome(0.1), "2": outcome(0.2), "4": outcome(0.4)}
    for size in study.BATCH_SIZES:
        write(f"nlcg-{size}", {**by_rate, "8": outcome(0.25)})
    write("nlcg-seed1", {"NLCG": outcome(0.3)})
    write("nlcg-seed2", {"NLCG": outcome(0.35)})


def test_the_best_rate_is_repeated_at_the_largest_batch(runs):
    row = study.row_of("NLCG", 2560)
    assert row["rates"] == [1.0, 2.0, 4.0, 8.0]
    assert row["accuracy_by_rate"] == [0.1, 0.2, 0.4, 0.25]
    assert row["rate"] == 4.0
    assert row["accuracy"] == [0.4, 0.3, 0.35]
    assert row["final_loss"] == 1.0
    assert row["steps"] == 4
    assert study.row_of("NLCG", 640)["accuracy"] == [0.4]


def test_the_picture_has_our_points_and_the_paper_s(runs):
    rows = [study.row_of("NLCG", size) for size in study.BATCH_SIZES]
    here, published = study.draw(rows).axes
    (line,) = [x for x in here.lines if len(x.get_xdata())]
    assert list(line.get_xdata()) == [160, 640, 2560]
    assert list(line.get_ydata()) == pytest.approx([0.4, 0.4, 0.35])
    assert line.get_label() == "NLCG"
    nlcg, rmsprop, momentum = published.lines
    assert list(nlcg.get_xdata()) == [128 * 2**k for k in range(8)]
    assert nlcg.get_ydata()[-1] == pytest.approx(0.56)  # nlcg.md section 5
    assert rmsprop.get_ydata()[0] == pytest.approx(0.649)
    assert momentum.get_ydata()[5] == pytest.approx(0.652)
