"""The command that prepares ImageNet: counts, faults, and going on after a kill."""

import collections
import fcntl
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import writer
from tensorflow_datasets.core.utils import shard_utils

from experiments import made_imagenet, prepare_imagenet
from experiments.data import imagenet_archives, imagenet_builder, splits

TRAIN, VALIDATION = 60, 40
COUNTS = ["--train-images", str(TRAIN), "--validation-images", str(VALIDATION)]
MIN_SHARD_SIZE = 12_000

KILLED = f"""
import os, signal, sys
from tensorflow_datasets.core import writer
from tensorflow_datasets.core.utils import shard_utils
from experiments import prepare_imagenet

write, shards = writer.ExampleWriter.write, []

def killed_in_the_third(self, path, examples):
    shards.append(path)
    def until_killed():
        for index, example in enumerate(examples):
            if len(shards) == 3 and index == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield example
    return write(self, path, until_killed())

shard_utils.ShardConfig.min_shard_size = {MIN_SHARD_SIZE}
writer.ExampleWriter.write = killed_in_the_third
prepare_imagenet.main(sys.argv[1:])
"""


@pytest.fixture(scope="module", autouse=True)
def _small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made_imagenet, "DRAWING_SIZE", 32)
        patch.setattr(shard_utils.ShardConfig, "min_shard_size", MIN_SHARD_SIZE)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("made")
    sizes = ["--min-size", "30", "--max-size", "60"]
    made_imagenet.main([str(directory), *COUNTS, *sizes])
    return directory


@pytest.fixture
def archives(made, tmp_path):
    """A copy of the archives that a test may damage."""
    return pathlib.Path(shutil.copytree(made, tmp_path / "archives"))


def run(archives, data_dir, *options):
    places = ["--archives", str(archives), "--data-dir", str(data_dir)]
    prepare_imagenet.main([*places, "--workers", "1", *(options or COUNTS)])


def fails(archives, data_dir, *options):
    with pytest.raises(SystemExit) as exit_:
        run(archives, data_dir, *options)
    message = exit_.value.code
    assert isinstance(message, str)  # which Python prints, with exit code 1
    assert message.startswith("error: ")
    assert not target(data_dir).exists()
    return message


def target(data_dir):
    return pathlib.Path(data_dir, "imagenet2012", "5.1.0")


def work(data_dir):
    return target(data_dir).with_name("incomplete.5.1.0")


def contents(data_dir):
    return {path.name: path.read_bytes() for path in target(data_dir).iterdir()}


@pytest.fixture(scope="module")
def undisturbed(made, tmp_path_factory):
    data_dir = tmp_path_factory.mktemp("undisturbed")
    run(made, data_dir)
    return data_dir


def test_what_is_prepared(undisturbed):
    assert [path.name for path in target(undisturbed).parent.iterdir()] == ["5.1.0"]
    builder = tfds.builder(
        "imagenet2012", data_dir=undisturbed, file_format="array_record"
    )
    lengths = {name: info.shard_lengths for name, info in builder.info.splits.items()}
    assert {name: sum(found) for name, found in lengths.items()} == {
        "train": TRAIN,
        "validation": VALIDATION,
    }
    assert len(lengths["train"]) > 3
    train = tfds.data_source("imagenet2012", data_dir=undisturbed, split="train")
    labels = collections.Counter(int(record["label"]) for record in train)
    assert labels == dict.fromkeys(range(20), 3)
    names = [record["file_name"].decode() for record in train]
    assert len(set(names)) == TRAIN
    # The CMYK and the PNG, in colour as all others; grey stays grey.
    assert {record["image"].shape[-1] for record in train} <= {1, 3}
    validation = splits.open_split("imagenet2012", "validation", undisturbed)
    found = collections.Counter(
        int(row["label"]) for row in map(validation.read, range(VALIDATION))
    )
    assert found == dict.fromkeys(range(20), 2)


def test_what_is_printed(made, tmp_path, capsys):
    run(made, tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "index of ILSVRC2012_img_train.tar: 20 of 20 parts",
        "index of ILSVRC2012_img_val.tar: 1 of 1 parts",
        "train: 60 of 60 images",
        "validation: 40 of 40 images",
        f"prepared {target(tmp_path)}: train 60, validation 40 images",
    ]
    before = contents(tmp_path)
    run(tmp_path / "archives are not needed any more", tmp_path)
    assert capsys.readouterr().out == f"{target(tmp_path)} is prepared already\n"
    assert contents(tmp_path) == before


def test_killed_and_started_again(made, undisturbed, tmp_path):
    arguments = ["--archives", made, "--data-dir", tmp_path, "--workers", "1", *COUNTS]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments])
    assert killed.returncode == -signal.SIGKILL
    assert not target(tmp_path).exists()
    shards = list((work(tmp_path) / "shards").iterdir())
    whole = {path.name: path.stat() for path in shards if path.name[0] != "p"}
    assert len(whole) == 2
    assert len(shards) == 3  # one of them was being written

    run(made, tmp_path)
    assert contents(tmp_path) == contents(undisturbed)
    for name, before in whole.items():  # done once
        after = (target(tmp_path) / name).stat()
        assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not work(tmp_path).exists()


@pytest.mark.slow
def test_killed_with_several_workers(made, undisturbed, tmp_path):
    script = KILLED.replace("writer.ExampleWriter.write = ", "_ = ")
    arguments = ["--archives", made, "--data-dir", tmp_path, "--workers", "2", *COUNTS]
    with subprocess.Popen([sys.executable, "-c", script, *arguments]) as process:
        while not list((work(tmp_path) / "shards").glob("imagenet2012*")):
            assert process.poll() is None
            time.sleep(0.002)
        process.kill()
    run(made, tmp_path)
    assert contents(tmp_path) == contents(undisturbed)


def counted(monkeypatch, module, name, stop_at=None):
    """The calls of a function, of which one is cut short by Ctrl-C."""
    function, calls = getattr(module, name), []

    def call(*arguments, **options):
        calls.append(arguments)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, call)
    return calls


@pytest.mark.parametrize(
    ("module", "name", "total"),
    [
        (imagenet_archives, "index", 21),
        (imagenet_builder, "write_shard", None),
        (imagenet_builder, "finish", 1),
        (prepare_imagenet.shutil, "rmtree", 1),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_stopped_at_any_stage(
    made, undisturbed, tmp_path, monkeypatch, module, name, total
):
    total = total or sum(n.startswith("imagenet2012") for n in contents(undisturbed))
    stop_at = min(3, total)
    with monkeypatch.context() as patch:
        counted(patch, module, name, stop_at=stop_at)
        with pytest.raises(SystemExit, match="stopped: start the same command again"):
            run(made, tmp_path)
    calls = counted(monkeypatch, module, name)
    run(made, tmp_path)
    assert contents(tmp_path) == contents(undisturbed)
    assert [path.name for path in target(tmp_path).parent.iterdir()] == ["5.1.0"]
    assert len(calls) == total - (stop_at - 1)


# -- faults ---------------------------------------------------------------------------


def test_wrong_counts(made, undisturbed, tmp_path):
    message = fails(made, tmp_path, "--train-images", "61")
    assert "img_train.tar holds 60 images, where 61 were expected" in message
    assert "1d675b47d978889d74fa0da5fadfb00e" in message
    assert "add --train-images 60" in message
    message = fails(made, tmp_path, "--train-images", "60")
    assert "img_val.tar holds 40 images, where 50,000 were expected" in message
    assert "add --validation-images 40" in message
    run(made, tmp_path)  # as the message says
    assert contents(tmp_path) == contents(undisturbed)

    with pytest.raises(SystemExit, match=r"^error: .*'train': 60.*; move it away"):
        run(made, tmp_path, "--train-images", "61")
    assert contents(tmp_path) == contents(undisturbed)


@pytest.mark.parametrize("options", [["--archives", "x"], ["--verify"]])
def test_a_copy_in_tensorflows_format(undisturbed, tmp_path, options):
    shutil.copytree(target(undisturbed), target(tmp_path))
    info = target(tmp_path) / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(SystemExit, match=r"^error: .* in another format than Array"):
        prepare_imagenet.main([*options, "--data-dir", str(tmp_path)])


def test_archives_are_named(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: archives: pass --archives"):
        prepare_imagenet.main(["--data-dir", str(tmp_path)])
    for name in ("workers", "train-images", "validation-images"):
        message = f"^error: {name.replace('-', '_')}=0 must be a whole number, ≥ 1"
        with pytest.raises(SystemExit, match=message):
            run(tmp_path, tmp_path, f"--{name}", "0")


@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"])
def test_damaged_archives(archives, tmp_path, name):
    path, data_dir = archives / name, tmp_path / "data"
    whole = path.read_bytes()
    path.unlink()
    assert f"there is no {path}; register" in fails(archives, data_dir)
    path.write_bytes(whole[: 2 * len(whole) // 3])
    assert f"{path} is not a whole, uncompressed tar" in fails(archives, data_dir)
    path.write_bytes(b"<html>not found</html>" * 100)
    assert f"{path} is not a whole, uncompressed tar" in fails(archives, data_dir)
    path.write_bytes(whole)  # fetched again: the message said so, and it goes on
    run(archives, data_dir)
    assert target(data_dir).exists()


def test_other_archives_than_it_was_begun_with(made, archives, tmp_path, monkeypatch):
    path = archives / "ILSVRC2012_img_val.tar"
    path.write_bytes(path.read_bytes() + bytes(10_240))
    with monkeypatch.context() as patch:
        counted(patch, imagenet_builder, "write_shard", stop_at=2)
        with pytest.raises(SystemExit, match="stopped"):
            run(made, tmp_path)
    message = fails(archives, tmp_path)
    assert f"{work(tmp_path)} were written from other archives" in message
    run(made, tmp_path)


def test_no_space_at_the_start(made, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(prepare_imagenet.shutil, "disk_usage", lambda path: usage)
    message = fails(made, tmp_path)
    assert "GB more, and 0.0 GB are free; make room or choose another" in message


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("/dev/full", "; make room and start the same command again, which continues"),
        ("/nowhere/shard", "cannot be written: open() failed: No such file or direct"),
    ],
)
def test_a_shard_that_cannot_be_written(
    made, undisturbed, tmp_path, monkeypatch, place, words
):
    write, calls = writer.ExampleWriter.write, []

    def elsewhere_at_the_third(self, path, examples):
        calls.append(path)
        return write(self, place if len(calls) == 3 else path, examples)

    with monkeypatch.context() as patch:
        patch.setattr(writer.ExampleWriter, "write", elsewhere_at_the_third)
        message = fails(made, tmp_path)
    assert words in message
    full = f"no space is left in {work(tmp_path)}" in message
    assert full == (place == "/dev/full")
    run(made, tmp_path)
    assert contents(tmp_path) == contents(undisturbed)


def test_a_directory_that_cannot_be_written(made, tmp_path):
    (tmp_path / "file").write_text("")
    message = fails(made, tmp_path / "file")
    assert "cannot be written (Not a directory); choose another --data-dir" in message


def test_two_at_once_or_something_else_there(made, tmp_path):
    work(tmp_path).mkdir(parents=True)
    with (work(tmp_path) / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process prepares" in fails(made, tmp_path)
    run(made, tmp_path)
    (target(tmp_path) / "dataset_info.json").unlink()
    with pytest.raises(SystemExit, match=r"^error: .* holds no data set"):
        run(made, tmp_path)


def test_a_killed_worker_is_explained(made, tmp_path, monkeypatch):
    def broken(*arguments):
        raise prepare_imagenet.concurrent.futures.process.BrokenProcessPool

    monkeypatch.setattr(prepare_imagenet.tasks, "completed", broken)
    assert "with fewer --workers" in fails(made, tmp_path)


# -- verifying ------------------------------------------------------------------------


def verify(data_dir):
    prepare_imagenet.main(["--verify", "--workers", "1", "--data-dir", str(data_dir)])


def test_verify(undisturbed, tmp_path, capsys):
    verify(undisturbed)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "all 100 images can be decoded"
    with pytest.raises(SystemExit, match=r"^error: imagenet2012 is not prepared in"):
        verify(tmp_path)


def test_verify_names_what_fails(archives, tmp_path, capsys):
    path = archives / "ILSVRC2012_img_val.tar"
    data = np.frombuffer(path.read_bytes(), np.uint8).copy()
    (part,) = imagenet_archives.parts(path, "validation")
    image = imagenet_archives.index(path, part, "validation")[7]
    data[image["start"] : image["start"] + image["size"]] = 0
    path.write_bytes(data.tobytes())
    run(archives, tmp_path)
    with pytest.raises(SystemExit, match=r"^error: 1 of 100 images cannot be decoded"):
        verify(tmp_path)
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "JPEG" in x]
    split, index, name, *_ = line.replace(":", "").split()
    assert (split, name) == ("validation", image["name"].decode())
    source = tfds.data_source(
        "imagenet2012",
        split=split,
        data_dir=tmp_path,
        decoders={"image": tfds.decode.SkipDecoding()},
    )
    record = source[int(index)]
    assert record["file_name"].decode() == name
    assert record["image"] == bytes(int(image["size"]))
