"""ImageNet's archives made, prepared, counted, trained on and evaluated."""

import functools

import numpy as np
import pytest

from experiments import (
    imagenet_resnet50,
    made_imagenet,
    metrics,
    prepare_imagenet,
)
from experiments.models import registry, resnet

CLASSES, TRAIN, VALIDATION = 20, 160, 40


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """What the README's first two commands leave."""
    root = tmp_path_factory.mktemp("imagenet")
    sizes = ["--train-images", str(TRAIN), "--validation-images", str(VALIDATION)]
    small = ["--num-classes", str(CLASSES), "--min-size", "40", "--max-size", "90"]
    made_imagenet.main([str(root / "archives"), *sizes, *small])
    places = ["--archives", str(root / "archives"), "--data-dir", str(root / "data")]
    prepare_imagenet.main([*places, *sizes, "--workers", "1"])
    return root / "data"


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("sgd", ["--dtype", "bfloat16"]),
        pytest.param(
            "sp_ngd_4k",
            ["--micro-batch-size", "8", "--devices", "2"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_published_settings_train_on_what_was_prepared(
    data_dir, tmp_path, monkeypatch, capsys, name, flags
):
    tiny = functools.partial(
        resnet.ResNet, stage_sizes=(1,), block=resnet.BasicBlock, width=4
    )
    monkeypatch.setitem(registry.MODELS, "resnet50", tiny)
    flags = {
        "--data-dir": data_dir,
        "--directory": tmp_path,
        "--recipe.image-size": 32,
        "--batch-size": 32,
        "--devices": 1,
        "--epochs": 6,
        "--warmup-epochs": 0,
        "--eval-batch-size": 16,
    } | dict(zip(flags[::2], flags[1::2], strict=True))
    imagenet_resnet50.main(
        [name, *(str(part) for pair in flags.items() for part in pair)]
    )
    records = metrics.read_json_lines(tmp_path / "metrics.jsonl")
    train = [r for r in records if r["kind"] == "train"]
    assert train[-1]["step"] == 6 * TRAIN // 32
    assert train[-1]["skipped"] == 0
    assert all(np.isfinite(r["loss"]) for r in train)
    assert train[-1]["loss"] < np.log(1000) < train[0]["loss"] * 1.2
    last = records[-1]
    assert last["kind"] == "test"
    # A whole number of the images: each counted once, the padding not at all.
    assert last["accuracy"] * VALIDATION == pytest.approx(
        round(last["accuracy"] * VALIDATION), abs=1e-6
    )
    assert "imagenet2012" in (tmp_path / "report.md").read_text()
    assert "memory per device: parameters" in capsys.readouterr().out
