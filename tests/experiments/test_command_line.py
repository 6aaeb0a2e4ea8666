"""The experiments' commands on few small images."""

import runpy
import sys

import pytest

from experiments import command_line, loop, metrics
from experiments.configs import alexnet, resnet32
from experiments.settings import Config

TINY = [
    *("--dataset", "strokes/tiny", "--batch-size", "64", "--epochs", "0.75"),
    *("--warmup-epochs", "0.25", "--eval-batch-size", "100"),
]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def run(module, arguments, data_dir, directory):
    places = ["--data-dir", str(data_dir), "--directory", str(directory)]
    command_line.run([*arguments, *TINY, *places], "", module.CONFIGS)
    records = metrics.read_json_lines(directory / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "train"] == [1, 2, 3]
    assert records[-1]["kind"] == "test"
    assert (directory / "report.png").stat().st_size > 10_000
    return records


@pytest.mark.parametrize("arguments", [[], ["rmsprop"]], ids=["none", "rmsprop"])
def test_the_residual_network(arguments, data_dir, tmp_path, capsys):
    flags = [*arguments, "--model", "preact_resnet8", "--recipe.image-size", "8"]
    records = run(resnet32, flags, data_dir, tmp_path)
    # The penalty on 77,000 weights is part of the loss: more than log 5 at the start.
    assert 1.6 < records[0]["loss"] < 4
    assert records[0]["skipped"] == 0
    assert " test accuracy " in capsys.readouterr().out


def test_alexnet_reads_resized_strokes(data_dir, tmp_path):
    flags = ["strokes", "--recipe.image-size", "67"]
    records = run(alexnet, flags, data_dir, tmp_path)
    assert 1.4 < records[0]["loss"] < 1.9


def test_an_unknown_name_is_refused_with_the_names_there_are():
    with pytest.raises(SystemExit, match=r"'vgg' names no settings.*alexnet_bn, alexn"):
        command_line.run(["vgg"], "", alexnet.CONFIGS)


@pytest.mark.parametrize("module", [alexnet, resnet32], ids=["alexnet", "resnet32"])
def test_an_unknown_setting_of_a_script_is_refused(module, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["script", "--vgg"])
    with pytest.raises(SystemExit):
        runpy.run_path(module.__file__, run_name="__main__")
    assert "vgg" in capsys.readouterr().err


def test_a_number_that_may_be_none(monkeypatch, capsys):
    read = []

    def prepare(config):
        read.append(config.doubly_factored)
        raise ValueError("far enough")

    monkeypatch.setattr(loop, "prepare", prepare)
    for text in ("512", "None"):
        with pytest.raises(SystemExit, match="far enough"):
            command_line.run(["--doubly-factored", text], "", {"": Config()})
    assert read == [512, None]
    with pytest.raises(SystemExit):
        command_line.run(["--doubly-factored", "0"], "", {"": Config()})
    assert "doubly_factored=0 must be positive" in capsys.readouterr().err
