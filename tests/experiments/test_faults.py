"""What may go wrong in a run, put in on purpose: clear messages, and nothing lost.

The table of `docs/how_to/long_runs.md` names the test of each fault; those of parts are
with the parts.
"""

import dataclasses
import errno
import json

import jax
import numpy as np
import pytest

from experiments import checkpoints, imagenet_resnet50, loop, metrics, settings
from experiments.data import decoding, pipeline
from experiments.models import registry
from tests.experiments.test_imagenet_resnet50 import TIMED, OneBlock


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run of eight steps with a checkpoint after every other."""
    root = tmp_path_factory.mktemp("whole")
    config = settings.Config(
        optimizer="sgd",
        dataset="strokes/tiny",
        data_dir=root / "data",
        batch_size=64,
        epochs=2.0,
        warmup_epochs=0.25,
        eval_batch_size=100,
        eval_epochs=1.0,
        checkpoint_epochs=0.5,
        directory=root / "run",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.MODELS, "resnet8", OneBlock)
        run = loop.prepare(config)
    loop.train(run)
    return run


def again(whole, directory, *, resume=False):
    """The same run in another directory; its program is compiled already."""
    config = dataclasses.replace(whole.config, directory=directory, resume=resume)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.MODELS, "resnet8", OneBlock)
        return loop.prepare(config)._replace(program=whole.program)


def records(directory, *kinds):
    return [
        {key: value for key, value in record.items() if not TIMED.search(key)}
        for record in metrics.read_json_lines(directory / "metrics.jsonl")
        if record["kind"] in kinds
    ]


def events(directory):
    return [record["message"] for record in records(directory, "event")]


def assert_same_end(whole, directory):
    assert records(directory, "train", "test") == records(
        whole.directory, "train", "test"
    )
    ends = []
    for place in (whole.directory, directory):
        with checkpoints.Checkpoints(place / "checkpoints") as store:
            like = whole.program.init()
            ends.append(store.restore_latest(lambda place, like=like: like))
    assert ends[0].step == ends[1].step == 8
    for one, other in zip(
        *(jax.tree.leaves(e.state.params) for e in ends), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def full_disk(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_at(patch, *full):
    """The disk is full while the checkpoints of some steps are written."""
    checksum = checkpoints._checksum

    def summed(path):
        if any(part.split(".")[0] in full for part in path.parts):
            full_disk()
        return checksum(path)

    patch.setattr(checkpoints, "_checksum", summed)


def test_a_full_disk_in_the_middle_is_reported_and_the_run_goes_on(
    whole, tmp_path, monkeypatch
):
    full_at(monkeypatch, "4")
    loop.train(again(whole, tmp_path / "run"))
    (message,) = events(tmp_path / "run")
    assert "the checkpoint of step 4 could not be written (" in message
    assert "No space left on device" in message
    assert "the newest is that of step 2" in message
    assert_same_end(whole, tmp_path / "run")


def test_a_disk_that_is_full_to_the_end_fails_the_run_and_it_goes_on_later(
    whole, tmp_path, monkeypatch
):
    directory = tmp_path / "run"
    with monkeypatch.context() as patch:
        full_at(patch, "6", "8")
        with pytest.raises(OSError, match="after step 8 is not on disk; make space in"):
            loop.train(again(whole, directory))
    loop.train(again(whole, directory, resume=True))
    assert "resumed at step 4" in events(directory)
    assert_same_end(whole, directory)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(whole, tmp_path):
    directory = tmp_path / "run"
    loop.train(again(whole, directory))
    state = directory / "checkpoints" / "8" / "state"
    largest = max(
        (path for path in state.rglob("*") if path.is_file()),
        key=lambda path: path.stat().st_size,
    )
    largest.write_bytes(largest.read_bytes()[:-1])
    loop.train(again(whole, directory, resume=True))
    assert any("step 8 is damaged" in message for message in events(directory))
    assert "resumed at step 6" in events(directory)
    assert_same_end(whole, directory)


def test_an_image_that_cannot_be_read_stops_the_run_after_saving(
    whole, tmp_path, monkeypatch
):
    directory, take = tmp_path / "run", pipeline.TrainingBatches.__next__

    def bad_at_five(batches):
        if batches.get_state() == 5:
            raise decoding.RecordError("record 17 cannot be decoded")
        return take(batches)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.TrainingBatches, "__next__", bad_at_five)
        with pytest.raises(decoding.RecordError, match="record 17"):
            loop.train(again(whole, directory))
    assert (directory / "checkpoints" / "5").is_dir()
    assert any("record 17" in message for message in events(directory))
    loop.train(again(whole, directory, resume=True))
    assert "resumed at step 5" in events(directory)
    assert_same_end(whole, directory)


def test_metrics_on_a_full_disk_are_kept_and_written_later(
    whole, tmp_path, monkeypatch
):
    from experiments import append_only

    directory, written = tmp_path / "run", []
    write = append_only.os.write

    def full_for_a_while(descriptor, data):
        written.append(data)
        if 3 < len(written) < 6:
            full_disk()
        return write(descriptor, data)

    monkeypatch.setattr(append_only.os, "write", full_for_a_while)
    loop.train(again(whole, directory))
    assert_same_end(whole, directory)


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        imagenet_resnet50.main([str(argument) for argument in arguments])
    text = str(stopped.value) + "".join(capsys.readouterr())
    assert stopped.value.code not in (0, None)
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--dataset", "imagenet2012"], "'imagenet2012' is not prepared in"),
        (["--dataset", "strokes/21"], "strokes has the configs"),
        (
            ["--directory", "/dev/null/run"],
            "directory: /dev/null/run cannot be written (Not a directory); choose",
        ),
        (
            ["--reader", "tf_data", "--num-workers", "2"],
            "reader=tf_data has threads of",
        ),
        (["--num-workers", "-1"], "num_workers=-1 must be 0 or positive"),
        (["sp_ngd_4k"], "batch_size must be at most 256, the number of training im"),
    ],
    ids=["no data", "no such set", "no directory", "reader", "workers", "few images"],
)
def test_what_cannot_be_begun_is_refused(whole, tmp_path, capsys, arguments, told):
    base = ["--data-dir", whole.config.data_dir, "--directory", tmp_path / "run"]
    if arguments[0].startswith("-"):
        base = ["--dataset", "strokes/tiny", "--batch-size", 64, *base]
    else:
        base = ["--dataset", "strokes/tiny", *base]
        arguments, base = arguments[1:], [arguments[0], *base]
    assert told in refused(capsys, *base, *arguments)
    assert not (tmp_path / "run").exists()


def test_a_disk_without_room_for_a_checkpoint_is_refused(whole, tmp_path, monkeypatch):
    usage = loop.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(loop.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"directory: .* has 0.00 GB left, but one check"):
        again(whole, tmp_path / "run")


def test_a_run_begun_by_an_older_version_goes_on(whole, tmp_path):
    """Settings that came later have their defaults then."""
    directory = tmp_path / "run"
    loop.train(again(whole, directory))
    path = directory / "config.json"
    config = json.loads(path.read_text())
    del config["remat"], config["bad_images"], config["mixup_form"]
    path.write_text(json.dumps(config))
    again(whole, directory, resume=True)
