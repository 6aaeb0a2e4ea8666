"""Prepares ImageNet from its two archives, without TensorFlow.

    python experiments/prepare_imagenet.py --archives ~/ilsvrc2012
    python experiments/prepare_imagenet.py --verify

The first command turns ``ILSVRC2012_img_train.tar`` and ``ILSVRC2012_img_val.tar``,
which image-net.org gives to registered users, into ``imagenet2012`` of
``tensorflow_datasets``.  It may be stopped or killed at any moment: started again, it
continues, and the result is the same.  ``experiments/data/imagenet_builder.py``
describes what is read and written.  The second command decodes every prepared image and
names those that fail.  ``experiments/made_imagenet.py`` makes small archives for a
trial.
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
from lbopt import checks


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the command."""

    archives: pathlib.Path | None = None
    """Directory of the two archives; not needed to verify."""
    data_dir: pathlib.Path = pathlib.Path("~/tensorflow_datasets")
    """Directory that holds data sets, one directory each."""
    train_images: int = NUM_IMAGES["train"]
    """Images expected in the training archive."""
    validation_images: int = NUM_IMAGES["validation"]
    """Images expected in the validation archive."""
    workers: int = 4
    """Processes; each needs about 400 MB of memory."""
    verify: bool = False
    """Decode every prepared image, instead of preparing them."""


class PreparationError(ValueError):
    """A reason why the data set cannot be prepared, or not yet."""


# Of the directory of unfinished work: one index file per part of an archive, and the
# shards, whose directory becomes the data set.
_INDEX, _SHARDS = "index", "shards"


def main(arguments: Sequence[str] | None = None) -> None:
    """Carries out a command line; None for that of the process."""
    try:
        options = tyro.cli(Options, args=arguments, description=__doc__)
        _check(options)
        data_dir = options.data_dir.expanduser().absolute()
        if options.verify:
            verify(data_dir, options.workers)
        else:
            prepare(options, data_dir)
    except (ValueError, imagenet_builder.ShardError, OSError) as error:
        sys.exit(f"error: {error}")
    except concurrent.futures.process.BrokenProcessPool:
        sys.exit(
            "error: a worker process was killed, perhaps for lack of memory; start the "
            "same command again with fewer --workers, and it continues"
        )
    except KeyboardInterrupt:
        sys.exit("stopped: start the same command again to continue")


def prepare(options: Options, data_dir: pathlib.Path) -> None:
    """Prepares the data set, or continues to.

    Args:
      options: the archives and their expected numbers of images.
      data_dir: directory that holds data sets, absolute.

    Raises:
      PreparationError: if the options, the archives or the disk do not allow it.
    """
    expected: dict[Split, int] = {
        "train": options.train_images,
        "validation": options.validation_images,
    }
    builder = imagenet_builder.open_builder(data_dir)
    target = pathlib.Path(builder.data_path)
    work = target.with_name(f"incomplete.{target.name}")
    if target.exists():
        _check_prepared(builder, target, expected)
        shutil.rmtree(work, ignore_errors=True)  # left if killed in the last step
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
            split: imagenet_builder.plan(rows, split, work / _SHARDS)
            for split, rows in images.items()
        }
        features = builder.info.features
        for split, path in archives.items():
            _write_shards(split, shards[split], path, features, options.workers)
        imagenet_builder.finish(builder, shards, work / _SHARDS)
    shutil.rmtree(work)
    counts = ", ".join(f"{split} {count:,}" for split, count in expected.items())
    print(f"prepared {target}: {counts} images")


def verify(data_dir: pathlib.Path, workers: int) -> None:
    """Decodes every image of the prepared data set and prints those that fail.

    Raises:
      PreparationError: if the data set is not prepared, or any image fails.
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
    for name in ("train_images", "validation_images", "workers"):
        checks.whole(name, getattr(options, name), "leave it out for the default")
    if options.archives is None and not options.verify:
        raise PreparationError(
            f"archives: pass --archives with the directory of "
            f"{' and '.join(TARS.values())}"
        )


def _find_archives(directory: pathlib.Path) -> dict[Split, pathlib.Path]:
    found: dict[Split, pathlib.Path] = {s: directory / TARS[s] for s in TARS}
    missing = [str(path) for path in found.values() if not path.is_file()]
    if missing:
        raise PreparationError(
            f"archives: there is no {' and no '.join(missing)}; register at "
            "https://image-net.org/download-images for the archives of ILSVRC2012"
        )
    return found


def _check_prepared(
    builder: Any, target: pathlib.Path, expected: Mapping[Split, int]
) -> None:
    """Raises PreparationError if the directory holds another number of images."""
    found = {
        split: builder.info.splits[split].num_examples if builder.is_prepared() else 0
        for split in expected
        if split in builder.info.splits
    }
    if found != expected:
        raise PreparationError(
            f"{target} exists, but holds {found or 'no data set'}, not {expected}; "
            "move it away or choose another --data-dir"
        )


def _check_count(split: Split, path: pathlib.Path, found: int, expected: int) -> None:
    if found != expected:
        raise PreparationError(
            f"{path} holds {found:,} images, where {expected:,} were expected. If it "
            f"should be the official archive, compare its MD5 sum with "
            f"{imagenet_archives.MD5[split]} and fetch it again; if it should hold "
            f"{found:,}, add --{split}-images {found}"
        )


@contextlib.contextmanager
def _begun(
    work: pathlib.Path, archives: Mapping[Split, pathlib.Path]
) -> Iterator[None]:
    """Locks the work directory, and explains a full disk."""
    try:
        for name in (_INDEX, _SHARDS):
            (work / name).mkdir(parents=True, exist_ok=True)
        lock = (work / "lock").open("w")
    except OSError as error:
        raise PreparationError(
            f"data_dir: {work} cannot be written ({error.strerror}); choose another "
            "--data-dir"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise PreparationError(
                f"another process prepares {work} now; wait for it or stop it"
            ) from error
        for path in work.glob(f"*/{imagenet_builder.PARTIAL}*"):
            path.unlink()
        _check_same_archives(work, archives)
        _check_space(work, archives)
        try:
            yield
        except (OSError, imagenet_builder.ShardError) as error:
            if not _is_full(error):
                raise
            raise PreparationError(
                f"no space is left in {work} ({error}); make room and start the same "
                "command again, which continues"
            ) from error


def _check_same_archives(
    work: pathlib.Path, archives: Mapping[Split, pathlib.Path]
) -> None:
    """Raises PreparationError if shards were written from other archives."""
    record = work / "archives.json"
    prints = {s: imagenet_archives.fingerprint(path) for s, path in archives.items()}
    if record.exists() and json.loads(record.read_text()) != prints:
        if any((work / _SHARDS).iterdir()):
            raise PreparationError(
                f"the shards in {work} were written from other archives than these; "
                "put those back, or remove this directory and start again"
            )
        for path in (work / _INDEX).iterdir():
            path.unlink()
    _write(record, json.dumps(prints).encode())


def _check_space(work: pathlib.Path, archives: Mapping[Split, pathlib.Path]) -> None:
    needed = sum(path.stat().st_size for path in archives.values())
    needed -= sum(path.stat().st_size for path in (work / _SHARDS).iterdir())
    if (free := shutil.disk_usage(work).free) < needed:
        raise PreparationError(
            f"data_dir: {work} needs {needed / 1e9:,.1f} GB more, and "
            f"{free / 1e9:,.1f} GB are free; make room or choose another --data-dir"
        )


def _is_full(error: Exception) -> bool:
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError):
        return error.errno in full
    return any(os.strerror(number) in str(error) for number in full)


def _indexed(
    split: Split, path: pathlib.Path, work: pathlib.Path, workers: int
) -> np.ndarray:
    """Returns the index of an archive; parts that are indexed already are read back."""
    parts = imagenet_archives.parts(path, split)
    files = [work / _INDEX / f"{split}.{part.name}.npy" for part in parts]
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
    """Writes a file, which takes its name when all of it is on disk."""
    partial = path.with_name(f"{imagenet_builder.PARTIAL}{os.getpid()}.{path.name}")
    with partial.open("wb") as file:
        file.write(contents)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


if __name__ == "__main__":
    main()
