"""The whole experiment on a tiny set and a tiny net, to the last file."""

import dataclasses
import functools
import gzip
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments import (
    classifier,
    compilation_cache,
    imagenet_resnet50,
    loop,
    metrics,
    optimizers,
    settings,
)
from experiments.data import pipeline
from experiments.models import registry, resnet
from tests.experiments.real_runs import assert_same_end

ROOT = pathlib.Path(imagenet_resnet50.__file__).parents[1]

OneBlock = functools.partial(
    resnet.ResNet, stage_sizes=(1,), block=resnet.BasicBlock, width=4, stem_reduction=2
)


@pytest.fixture(autouse=True)
def one_block(monkeypatch):
    monkeypatch.setitem(registry.MODELS, "resnet8", OneBlock)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture
def flags(data_dir):
    values = {"dataset": "strokes/tiny", "data-dir": data_dir, "batch-size": 64}
    values |= {"epochs": 2, "warmup-epochs": 0.25, "eval-batch-size": 64}
    return [part for key, value in values.items() for part in (f"--{key}", str(value))]


@pytest.fixture
def config(data_dir):
    return settings.Config(
        dataset="strokes/tiny",
        data_dir=data_dir,
        batch_size=64,
        epochs=1.5,
        warmup_epochs=0.25,
        eval_batch_size=64,
        eval_epochs=0.5,
        checkpoint_epochs=1.0,
    )


def test_the_demo_trains_with_both_and_draws_both(flags, tmp_path, capsys):
    imagenet_resnet50.main(["demo", *flags, "--directory", str(tmp_path)])
    (root,) = tmp_path.iterdir()
    for optimizer in ("sgd", "sp_ngd"):
        records = metrics.read_json_lines(root / optimizer / "metrics.jsonl")
        train = [r for r in records if r["kind"] == "train"]
        assert [r["step"] for r in train] == list(range(1, 9))
        assert all(np.isfinite(r["loss"]) for r in train)
        assert train[-1]["loss"] < 3
        assert train[-1]["skipped"] == 0
        assert [r["step"] for r in records if r["kind"] == "test"] == [4, 8]
        assert (root / optimizer / "report.png").stat().st_size > 10_000
        assert any((root / optimizer / "tensorboard").iterdir())
        assert (root / optimizer / "checkpoints" / "8").is_dir()
    output = capsys.readouterr()
    picture = root / "sgd_and_sp_ngd.png"
    assert picture.stat().st_size > 10_000
    assert str(picture.resolve()) in output.out
    assert output.out.count(" test accuracy ") == 2
    assert "sp_ngd  epoch 2/2  step 8/8" in output.err
    assert "stage1_block1/Conv_0" in output.out, "the table of layers is shown"


class Killed(BaseException):
    """Ends a run as a signal would: nothing of it is handled."""


@pytest.mark.parametrize(
    "settings",
    [
        # SGD stops and resumes in test_faults; K-FAC is killed for real in
        # test_interruptions.
        {"optimizer": "sp_ngd", "devices": 4, "placement": "memory"},
        {
            "optimizer": "nlcg",
            "weight_average": 0.9,
            "l2": 1e-3,
            "schedule": "staircase",
            "decay_epochs": (1.0,),
            "warmup_shape": "sqrt",
        },
    ],
    ids=["sp_ngd on 4 devices", "nlcg with averaged weights"],
)
def test_a_killed_run_resumes_bit_for_bit(config, tmp_path, monkeypatch, settings):
    config = dataclasses.replace(config, **settings)
    whole, killed = (
        dataclasses.replace(config, directory=tmp_path / name)
        for name in ("whole", "killed")
    )
    run = loop.prepare(whole)
    accuracy = loop.train(run)

    def prepare(config):
        # The same program, so that the test compiles it once.
        return loop.prepare(config)._replace(program=run.program)

    take = pipeline.TrainingBatches.__next__

    def take_five(batches):
        if batches.get_state() == 5:
            raise Killed
        return take(batches)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.TrainingBatches, "__next__", take_five)
        with pytest.raises(Killed):
            loop.train(prepare(killed))
    resumed = prepare(dataclasses.replace(killed, resume=True))
    assert loop.train(resumed) == accuracy

    state = resumed.program.init()
    assert_same_end(tmp_path / "whole", tmp_path / "killed", state, step=6)


def test_evaluation_is_the_mean_over_the_test_images(config, tmp_path):
    config = dataclasses.replace(config, optimizer="sgd", directory=tmp_path)
    run = loop.prepare(config)
    state = run.program.init()
    means = [
        classifier.evaluate(
            run.program,
            state,
            dataclasses.replace(
                run.data,
                test=classifier.open_data(
                    dataclasses.replace(config, eval_batch_size=size)
                ).test,
            ),
        )
        for size in (100, 33)  # 33 pads the last batch by 32
    ]
    assert means[0].keys() == {"loss", "accuracy"}
    assert means[0] == pytest.approx(means[1], rel=1e-5)
    assert 100 * means[0]["accuracy"] == pytest.approx(
        round(100 * means[0]["accuracy"])
    )


def test_label_smoothing_is_in_the_training_loss(config):
    model = OneBlock(num_classes=5)
    batch = {
        "image": np.random.default_rng(0).normal(size=(8, 16, 16, 3)),
        "label": np.arange(8) % 5,
    }
    variables = dict(model.init(jax.random.key(0), batch["image"], train=True))
    params = variables.pop("params")
    losses = []
    for smoothing in (0.0, 0.5, 1.0):
        loss_fn = classifier.make_loss(model, smoothing)
        losses.append(float(loss_fn(params, variables, batch, jax.random.key(0))[0]))
    assert losses[1] == pytest.approx((losses[0] + losses[2]) / 2, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch-size", "0"], "batch_size=0 must be positive"),
        (["--batch-size", "300"], "batch_size=300 must be at most 256"),
        (["--devices", "3"], "batch_size=64 must be a multiple of 3 devices"),
        (
            ["--devices", "4", "--micro-batch-size", "10"],
            "batch_size=64 must be a multiple of 4 devices × micro_batch_size=10",
        ),
        (
            ["--devices", "4", "--eval-batch-size", "30"],
            "eval_batch_size must be a mul",
        ),
        (["--num-workers", "-1"], "num_workers.*-1"),
        (["--sync-norm"], "sync_norm needs several devices"),
        (["--remat", "--model", "convnet"], "remat: convnet has no residual blocks"),
        (["--distributed", "on"], "distributed='on' finds no other processes"),
        (["--devices", "16"], r"devices=16, but there are 8"),
        (["--optimizer", "sp_ngd", "--sp-ngd.damping", "0"], "damping=0.0 must be"),
        (["--warmup-epochs", "8"], r"warmup_epochs=8.0 must lie in \[0, 2.0\)"),
        (["--optimizer", "lars", "--lars.weight-decay", "-1"], "weight_decay=-1.0 mus"),
        (["--kfac.learning-rate", "0"], "kfac.learning_rate=0.0 must be positive"),
        (["--kfac.damping", "-0.5"], "damping.*-0.5"),
        (["--kfac.inverse-period", "0"], "inverse_period.*0"),
        (["--dataset", "strokes/21"], "configs.*'21'"),
        (["--dataset", "no_such"], "dataset.*'no_such'"),
        (["--model", "resnet9"], "resnet9"),
        (
            ["--optimizer", "sgd", "--kfac.damping", ".1"],
            "kfac.damping is not read by optimizer=sgd; leave it out, or pass "
            "--optimizer kfac",
        ),
        (["--sp_ngd.rescale=None"], "sp_ngd.rescale=None is not read by optimizer=kf"),
        (["--optimizer", "sgd", "--fisher", "sampled"], "fisher is not read by opti"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_compiled(
    flags, tmp_path, capsys, monkeypatch, arguments, message
):
    def init(*arguments):
        raise AssertionError("the run was begun")

    monkeypatch.setattr(loop, "train", init)
    directory = tmp_path / "run"
    with pytest.raises(SystemExit) as stopped:
        imagenet_resnet50.main([*flags, *arguments, "--directory", str(directory)])
    output = capsys.readouterr()
    # The box that the message may stand in breaks lines; a reader does not mind.
    text = " ".join((str(stopped.value) + output.out + output.err).split())
    assert re.search(message, text.replace("│ ", ""))
    assert stopped.value.code not in (0, None)
    assert not directory.exists(), "a refused run claims no directory"


def test_the_demo_refuses_what_neither_of_its_runs_reads(flags, tmp_path):
    with pytest.raises(SystemExit, match="is not read by optimizer=sgd and sp_ngd"):
        imagenet_resnet50.main(
            ["demo", *flags, "--kfac.damping", ".1", "--directory", str(tmp_path)]
        )


def test_a_run_is_traced_and_names_the_layer_of_a_bad_batch(
    config, tmp_path, monkeypatch, capsys
):
    take = pipeline.TrainingBatches.__next__

    def spoiled(batches):
        number, batch = batches.get_state(), take(batches)
        image = batch["image"] * (np.nan if number == 4 else 1)
        return {**batch, "image": image.astype(batch["image"].dtype)}

    monkeypatch.setattr(pipeline.TrainingBatches, "__next__", spoiled)
    run = loop.prepare(dataclasses.replace(config, directory=tmp_path, profile=True))
    loop.train(run)
    train = [
        r
        for r in metrics.read_json_lines(tmp_path / "metrics.jsonl")
        if r["kind"] == "train"
    ]
    assert [r["skipped"] for r in train] == [0, 0, 0, 0, 1, 1]
    # The layers that see the images' numbers; the first in the table has them too.
    named = [r.get("layer_not_finite") for r in train]
    path = next(iter(run.program.layers))
    assert named == [None] * 4 + [path, None]
    assert f"step 5/6  numbers that are not finite in layer {path}" in (
        capsys.readouterr().err
    )
    assert f"{path} (step 5)" in (tmp_path / "report.md").read_text()
    # The rate rises in one step, then falls; a step that is skipped does not count.
    schedule = optimizers.build_schedule(run.config, run.data, 0.03)
    rates = [float(schedule(count)) for count in (0, 1, 2, 3, 4, 4)]
    assert [r["learning_rate"] for r in train] == pytest.approx(rates, rel=1e-5)
    assert all(0 < r["kl_scale"] <= 1 for r in train)
    assert train[4]["grad_norm"] is None
    traces = list((tmp_path / "profile").rglob("perfetto_trace.json.gz"))
    assert len(traces) == 1
    with gzip.open(traces[0], "rt") as file:
        events = json.load(file)
    events = events["traceEvents"] if isinstance(events, dict) else events
    steps = [e for e in events if e.get("name") == "step"]
    assert len(steps) == 3


def test_compiled_programs_are_kept_beside_the_runs(tmp_path, monkeypatch):
    places = []
    monkeypatch.setattr(compilation_cache, "share_programs", places.append)

    def prepare(config):
        raise ValueError("far enough")

    monkeypatch.setattr(loop, "prepare", prepare)
    directory = ["--directory", str(tmp_path / "runs" / "a")]
    for flags in (directory, [], [*directory, "--no-compilation-cache"]):
        with pytest.raises(SystemExit, match="far enough"):
            imagenet_resnet50.main(flags)
    assert places == [tmp_path / "runs", pathlib.Path("runs")]


@pytest.mark.parametrize("before", [None, "of the user's"])
def test_a_directory_of_the_users_own_is_kept(tmp_path, before):
    kept = jax.config.values["jax_compilation_cache_dir"]
    try:
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.share_programs(tmp_path)
        now = jax.config.values["jax_compilation_cache_dir"]
        assert now == (before or str(tmp_path / "compiled"))
    finally:
        jax.config.update("jax_compilation_cache_dir", kept)


def test_the_demo_refuses_bad_settings_of_its_second_run_before_the_first(
    flags, tmp_path
):
    with pytest.raises(SystemExit, match="damping"):
        imagenet_resnet50.main(
            ["demo", *flags, "--sp-ngd.damping", "0", "--directory", str(tmp_path)]
        )
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_a_finished_run_is_not_overwritten(config, tmp_path):
    config = dataclasses.replace(config, optimizer="sgd", directory=tmp_path)
    loop.prepare(config)
    with pytest.raises(FileExistsError, match="--resume"):
        loop.prepare(config)


@pytest.mark.parametrize(
    "command",
    [["experiments/imagenet_resnet50.py"], ["-m", "experiments.imagenet_resnet50"]],
)
def test_runs_as_a_file_and_as_a_module(command):
    done = subprocess.run(
        [sys.executable, *command, "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--kfac.damping" in done.stdout
