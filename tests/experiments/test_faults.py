"""What may go wrong in a run, put in on purpose: clear messages, and nothing lost.

The table of `docs/how_to/long_runs.md` names the test of each fault; those of parts are
with the parts.
"""

import dataclasses
import errno

import pytest

from experiments import checkpoints, imagenet_resnet50, loop, metrics, settings
from experiments.data import decoding, pipeline
from experiments.models import registry
from tests.experiments.real_runs import assert_same_end
from tests.experiments.test_imagenet_resnet50 import OneBlock


@pytest.fixture(scope="module", autouse=True)
def one_block():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.MODELS, "resnet8", OneBlock)
        yield


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
    run = loop.prepare(config)
    loop.train(run)
    return run


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "run"


def again(whole, directory, *, resume=False):
    """The same run in another directory; its program is compiled already."""
    config = dataclasses.replace(whole.config, directory=directory, resume=resume)
    return loop.prepare(config)._replace(program=whole.program)


def resumed(whole, directory):
    """The messages of the run, when it has ended as the undisturbed one."""
    loop.train(again(whole, directory, resume=True))
    return finished(whole, directory)


def finished(whole, directory):
    assert_same_end(whole.directory, directory, whole.program.init(), step=8)
    found = metrics.read_json_lines(directory / "metrics.jsonl")
    return [record["message"] for record in found if record["kind"] == "event"]


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
    whole, directory, monkeypatch
):
    full_at(monkeypatch, "4")
    loop.train(again(whole, directory))
    (message,) = finished(whole, directory)
    assert "the checkpoint of step 4 could not be written (" in message
    assert "No space left on device" in message
    assert "the newest is that of step 2" in message


def test_a_disk_that_is_full_to_the_end_fails_the_run_and_it_goes_on_later(
    whole, directory, monkeypatch
):
    with monkeypatch.context() as patch:
        full_at(patch, "6", "8")
        with pytest.raises(OSError, match="after step 8 is not on disk; make space in"):
            loop.train(again(whole, directory))
    assert "resumed at step 4" in resumed(whole, directory)


def test_a_damaged_checkpoint_costs_the_steps_since_the_one_before(whole, directory):
    loop.train(again(whole, directory))
    (directory / "checkpoints" / "8" / "checksums.json").unlink()
    messages = resumed(whole, directory)
    assert any("step 8 is damaged" in message for message in messages)
    assert "resumed at step 6" in messages


def test_an_image_that_cannot_be_read_stops_the_run_after_saving(
    whole, directory, monkeypatch
):
    take = pipeline.TrainingBatches.__next__

    def bad_at_five(batches):
        if batches.get_state() == 5:
            raise decoding.RecordError("record 17 cannot be decoded")
        return take(batches)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline.TrainingBatches, "__next__", bad_at_five)
        with pytest.raises(decoding.RecordError, match="record 17"):
            loop.train(again(whole, directory))
    assert (directory / "checkpoints" / "5").is_dir()
    messages = resumed(whole, directory)
    assert any("record 17" in message for message in messages)
    assert "resumed at step 5" in messages


def test_metrics_on_a_full_disk_are_kept_and_written_later(
    whole, directory, monkeypatch
):
    written, write = [], metrics.os.write

    def full_for_a_while(descriptor, data):
        if data.startswith(b'{"kind"'):
            written.append(data)
            if 3 < len(written) < 6:
                full_disk()
        return write(descriptor, data)

    monkeypatch.setattr(metrics.os, "write", full_for_a_while)
    loop.train(again(whole, directory))
    first, last = finished(whole, directory)
    assert "cannot be written (No space left on device)" in first
    assert "can be written again" in last


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--dataset", "imagenet2012"], "'imagenet2012' is not prepared in"),
        (
            ["--directory", "/dev/null/run"],
            "directory=/dev/null/run must be writable (Not a directory); choose",
        ),
        (["--num-workers", "-1"], "num_workers=-1 must be 0 or positive"),
    ],
    ids=["no data", "no directory", "workers"],
)
def test_what_cannot_be_begun_is_refused(whole, directory, capsys, arguments, told):
    base = ["--dataset", "strokes/tiny", "--batch-size", "64"]
    base += ["--data-dir", str(whole.config.data_dir), "--directory", str(directory)]
    with pytest.raises(SystemExit) as stopped:
        imagenet_resnet50.main([*base, *arguments])
    assert stopped.value.code not in (0, None)
    text = str(stopped.value) + "".join(capsys.readouterr())
    assert told in " ".join(text.split())
    assert not directory.exists()


def test_a_disk_without_room_for_a_checkpoint_is_refused(whole, directory, monkeypatch):
    usage = loop.shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(loop.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"directory=.* GB free for one .* has 0.00 GB"):
        again(whole, directory)
