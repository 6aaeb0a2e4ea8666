"""Prepares ImageNet from its two archives, without TensorFlow.

    python experiments/prepare_imagenet.py --archives ~/ilsvrc2012
    python experiments/prepare_imagenet.py --verify

The first command turns `ILSVRC2012_img_train.tar` and `ILSVRC2012_img_val.tar`, which
image-net.org gives to those who register, into `imagenet2012` of `tensorflow_datasets`.
It may be stopped or killed at any moment: started again, it goes on where it was, and
the result is the same. `experiments/data/imagenet_builder.py` says what is read and
written. The second command decodes every prepared image and names those that fail.

`experiments/made_imagenet.py` makes small archives to try this with.
"""

import concurrent.futures.process
import contextlib
import dataclasses
import errno
import fcntl
import io
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tyro

from experiments import tasks
from experiments.data import imagenet_archives, imagenet_builder, imagenet_check
from experiments.data.imagenet_archives import NUM_IMAGES, TARS, Split


@dataclasses.dataclass(frozen=True)
class Options:
    """What to prepare, and where."""

    archives: pathlib.Path | None = None
    """Directory of the two archives; not needed to verify."""
    data_dir: pathlib.Path = pathlib.Path("~/tensorflow_datasets")
    """Directory that holds data sets, one directory each."""
    train_images: int = NUM_IMAGES["train"]
    """Images that the training archive should hold."""
    validation_images: int = NUM_IMAGES["validation"]
    """Images that the validation archive should hold."""
    workers: int = 4
    """Processes; each needs about 400 MB of memory."""
    verify: bool = False
    """Decode every image of what is prepared, instead of preparing it."""


class PreparationError(ValueError):
    """The data set cannot be prepared, or not yet."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Where a preparation keeps what it has done so far.

    Attributes:
        directory: Beside the final directory, so that it can be renamed.
    """

    directory: pathlib.Path

    @property
    def index(self) -> pathlib.Path:
        """Directory of the index, one file a part of an archive."""
        return self.directory / "index"

    @property
    def shards(self) -> pathlib.Path:
        """Directory of the shards, which becomes the data set."""
        return self.directory / "shards"


def main(arguments: Sequence[str] | None = None) -> None:
    """Carries out a command line.

    Args:
        arguments: Without the program's name; `None` for those of the process.
    """
    try:
        options = tyro.cli(Options, args=arguments, description=__doc__)
        _check(options)
        data_dir = options.data_dir.expanduser().absolute()
        if options.verify:
            verify(data_dir, options.workers)
        else:
            prepare(options, data_dir)
    except (
        PreparationError,
        imagenet_archives.ArchiveError,
        imagenet_builder.ShardError,
        OSError,
    ) as error:
        sys.exit(f"error: {error}")
    except concurrent.futures.process.BrokenProcessPool:
        sys.exit(
            "error: a worker process was killed, perhaps for want of memory. Start "
            "the same command again, with fewer --workers; it goes on where it was."
        )
    except KeyboardInterrupt:
        sys.exit("stopped: start the same command again to go on")


def prepare(options: Options, data_dir: pathlib.Path) -> None:
    """Prepares the data set, or goes on with it.

    Args:
        options: The archives and how many images they should hold.
        data_dir: Directory that holds data sets, absolute.

    Raises:
        PreparationError: If something stands in the way; the message says what to do.
    """
    expected: dict[Split, int] = {
        "train": options.train_images,
        "validation": options.validation_images,
    }
    builder = imagenet_builder.open_builder(data_dir)
    target = pathlib.Path(builder.data_path)
    work = Work(target.with_name(f"incomplete.{target.name}"))
    if target.exists():
        _check_prepared(builder, target, expected)
        shutil.rmtree(work.directory, ignore_errors=True)  # killed while doing this
        print(f"{target} is prepared already")
        return
    assert options.archives is not None
    archives = _find_archives(options.archives.expanduser())
    with _begun(work, archives):
        images: dict[Split, np.ndarray] = {
            split: _indexed(split, path, work, options.workers)
            for split, path in archives.items()
        }
        for split, path in archives.items():
            _check_count(split, path, len(images[split]), expected[split])
        shards: dict[Split, list[imagenet_builder.Shard]] = {
            split: imagenet_builder.plan(rows, split, work.shards)
            for split, rows in images.items()
        }
        features = builder.info.features
        for split, path in archives.items():
            _write_shards(split, shards[split], path, features, options.workers)
        imagenet_builder.finish(builder, shards, work.shards)
    shutil.rmtree(work.directory)
    counts = ", ".join(f"{split} {count:,}" for split, count in expected.items())
    print(f"prepared {target}: {counts} images")


def verify(data_dir: pathlib.Path, workers: int) -> None:
    """Decodes every image of the prepared data set and prints those that fail.

    Args:
        data_dir: Directory that holds data sets, absolute.
        workers: Processes.

    Raises:
        PreparationError: If the data set is not prepared, or any image fails.
    """
    builder = imagenet_builder.open_builder(data_dir)
    if not builder.is_prepared():
        raise PreparationError(
            f"imagenet2012 is not prepared in {builder.data_path}; prepare it first"
        )
    failed = total = 0
    for split in TARS:
        info = builder.info.splits[split]
        ends = np.cumsum(info.shard_lengths).tolist()
        pieces = [
            (data_dir, split, end - length, end)
            for end, length in zip(ends, info.shard_lengths, strict=True)
        ]
        done = tasks.completed(imagenet_check.undecodable, pieces, workers)
        found = []
        with tasks.Progress(f"verify {split}", ends[-1], 0, "images") as progress:
            for (_, _, start, end), images in done:
                found += images
                progress.update(end - start)
        for image in sorted(found):
            print(f"{split} {image.index} {image.name}: {image.reason}")
        failed += len(found)
        total += ends[-1]
    if failed:
        raise PreparationError(f"{failed:,} of {total:,} images cannot be decoded")
    print(f"all {total:,} images can be decoded")


def _check(options: Options) -> None:
    """Refuses what cannot be meant, naming the option."""
    for name in ("train_images", "validation_images", "workers"):
        if (value := getattr(options, name)) < 1:
            raise PreparationError(f"{name} must be positive, got {value}")
    if options.archives is None and not options.verify:
        raise PreparationError(
            "archives: say with --archives in which directory the archives "
            f"{' and '.join(TARS.values())} are"
        )


def _find_archives(directory: pathlib.Path) -> dict[Split, pathlib.Path]:
    found: dict[Split, pathlib.Path] = {s: directory / TARS[s] for s in TARS}
    missing = [str(path) for path in found.values() if not path.is_file()]
    if missing:
        raise PreparationError(
            f"archives: there is no {' and no '.join(missing)}. Who registers at "
            "https://image-net.org/download-images gets the archives of ILSVRC2012"
        )
    return found


def _check_prepared(
    builder: Any, target: pathlib.Path, expected: Mapping[Split, int]
) -> None:
    """Refuses a directory that holds something else than what is asked for."""
    found = {
        split: builder.info.splits[split].num_examples if builder.is_prepared() else 0
        for split in expected
        if split in builder.info.splits
    }
    if found != expected:
        raise PreparationError(
            f"{target} exists, but holds {found or 'no data set'}, not {expected}. "
            "Move it away or name another --data-dir"
        )


def _check_count(split: Split, path: pathlib.Path, found: int, expected: int) -> None:
    if found != expected:
        raise PreparationError(
            f"{path} holds {found:,} images, where {expected:,} were expected. If it "
            f"should be the official archive, compare its MD5 sum with "
            f"{imagenet_archives.MD5[split]} and fetch it again; if it should hold "
            f"{found:,}, add --{split}-images {found}. Nothing was prepared"
        )


@contextlib.contextmanager
def _begun(work: Work, archives: Mapping[Split, pathlib.Path]) -> Iterator[None]:
    """Holds the work directory, and says what a failure to write there means."""
    try:
        work.index.mkdir(parents=True, exist_ok=True)
        work.shards.mkdir(exist_ok=True)
        lock = (work.directory / "lock").open("w")
    except OSError as error:
        raise PreparationError(
            f"data_dir: {work.directory} cannot be written ({error.strerror}); name "
            "another --data-dir"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise PreparationError(
                f"another process prepares {work.directory} at this moment; wait for "
                "it or stop it"
            ) from error
        for path in work.directory.glob(f"*/{imagenet_builder.PARTIAL}*"):
            path.unlink()
        _check_same_archives(work, archives)
        _check_space(work, archives)
        try:
            yield
        except (OSError, imagenet_builder.ShardError) as error:
            if not _is_full(error):
                raise
            raise PreparationError(
                f"no space is left in {work.directory} ({error}). What is done is "
                "kept: make room and start the same command again"
            ) from error


def _check_same_archives(work: Work, archives: Mapping[Split, pathlib.Path]) -> None:
    """Refuses to go on with other archives than those the work was begun with."""
    record = work.directory / "archives.json"
    prints = {s: imagenet_archives.fingerprint(path) for s, path in archives.items()}
    if record.exists() and json.loads(record.read_text()) != prints:
        if any(work.shards.iterdir()):
            raise PreparationError(
                f"the shards in {work.directory} were written from other archives "
                "than these. Put those back, or remove this directory and start again"
            )
        for path in work.index.iterdir():
            path.unlink()
    _write(record, json.dumps(prints).encode())


def _check_space(work: Work, archives: Mapping[Split, pathlib.Path]) -> None:
    """Refuses to begin what the disk has no room for."""
    needed = sum(path.stat().st_size for path in archives.values())
    needed -= sum(path.stat().st_size for path in work.shards.iterdir())
    free = shutil.disk_usage(work.directory).free
    if free < needed:
        raise PreparationError(
            f"data_dir: {work.directory} needs {needed / 1e9:,.1f} GB more, and "
            f"{free / 1e9:,.1f} GB are free. Make room or name another --data-dir"
        )


def _is_full(error: Exception) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in full
    return any(os.strerror(number) in str(error) for number in full)


def _indexed(split: Split, path: pathlib.Path, work: Work, workers: int) -> np.ndarray:
    """The images of an archive; parts that are indexed already are read back."""
    parts = imagenet_archives.parts(path, split)
    files = [work.index / f"{split}.{part.name}.npy" for part in parts]
    missing = [
        (path, part, split, file)
        for part, file in zip(parts, files, strict=True)
        if not file.exists()
    ]
    with tasks.Progress(
        f"index of {path.name}", len(parts), len(parts) - len(missing), "parts"
    ) as progress:
        for _ in tasks.completed(_write_index, missing, workers):
            progress.update(1)
    return np.concatenate([np.load(file) for file in files])


def _write_index(
    path: pathlib.Path,
    part: imagenet_archives.Part,
    split: Split,
    file: pathlib.Path,
) -> None:
    contents = io.BytesIO()
    np.save(contents, imagenet_archives.index(path, part, split))
    _write(file, contents.getvalue())


def _write_shards(
    split: Split,
    shards: Sequence[imagenet_builder.Shard],
    archive: pathlib.Path,
    features: Any,
    workers: int,
) -> None:
    """Writes the shards that are not there yet."""
    missing = [(s, archive, features) for s in shards if not s.path.exists()]
    total = sum(len(shard.images) for shard in shards)
    done = total - sum(len(shard.images) for shard, *_ in missing)
    with tasks.Progress(f"{split}", total, done, "images") as progress:
        written = tasks.completed(imagenet_builder.write_shard, missing, workers)
        for (shard, *_), _ in written:
            progress.update(len(shard.images))


def _write(path: pathlib.Path, contents: bytes) -> None:
    """Writes a file whose name appears when all of it is on disk."""
    partial = path.with_name(f"{imagenet_builder.PARTIAL}{os.getpid()}.{path.name}")
    with partial.open("wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


if __name__ == "__main__":
    main()
