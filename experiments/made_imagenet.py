"""Makes a small ImageNet of drawings, in archives with the official layout.

    python experiments/made_imagenet.py ~/made_imagenet
    python experiments/made_imagenet.py ~/made_imagenet --num-classes 100

The images are the drawings of ``experiments/data/strokes.py``, as JPEGs of varying size
and aspect, so the classes can be learnt: class ``i`` of the drawings is the synset of
label ``i``.  As in the official training set a few images are CMYK, one is a PNG named
.JPEG, some are grey, and some carry long metadata.

The label of a validation image follows from the number in its name, by the official
list, which names each class 50 times, in no order.  The validation images therefore
have the numbers that belong to the made classes, ascending but not consecutive, and at
most 50 per class.  ``experiments/prepare_imagenet.py`` goes by these numbers;
TensorFlow goes by the position among the sorted names, which is the same for the whole
official archive only.
"""

import dataclasses
import io
import math
import pathlib
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import numpy as np
import tqdm
import tyro
from PIL import Image

from experiments.data import imagenet_archives, strokes
from experiments.data.imagenet_archives import Split

Oddity = Literal["cmyk", "png", "grey", "metadata"]

DRAWING_SIZE = 64
"""Height and width of a drawing, in pixels, before it is resized."""

_VALIDATION_PER_CLASS = 50  # in the official list


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of the command."""

    directory: Annotated[pathlib.Path, tyro.conf.Positional]
    """Directory of the archives; made if missing."""
    num_classes: int = 20
    """Classes, at most 1,000."""
    train_images: int = 2000
    """Training images, spread evenly over the classes."""
    validation_images: int = 500
    """Validation images, at most 50 per class."""
    min_size: int = 60
    """Least height and width, in pixels."""
    max_size: int = 500
    """Greatest height and width, in pixels."""
    seed: int = 0
    """Seed of the drawings and their sizes."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Carries out a command line; None for that of the process."""
    try:
        options = tyro.cli(Options, args=arguments, description=__doc__)
        make(options)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    train, validation = options.train_images, options.validation_images
    print(f"made {train:,} and {validation:,} images; prepare them with")
    print(
        f"python experiments/prepare_imagenet.py --archives {options.directory} "
        f"--train-images {train} --validation-images {validation}"
    )


def make(options: Options) -> None:
    """Draws the images and writes the two archives.

    Raises:
      ValueError: if an option is out of range.
      FileExistsError: if there are archives already, perhaps the official ones.
    """
    _check(options)
    directory = options.directory.expanduser()
    tars = {split: directory / name for split, name in imagenet_archives.TARS.items()}
    for path in tars.values():
        if path.exists():
            raise FileExistsError(f"{path} exists; choose another directory")
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        made = pathlib.Path(scratch)
        _make_train(options, made / "train.tar", made)
        _make_validation(options, made / "validation.tar")
        for split, path in tars.items():
            (made / f"{split}.tar").rename(path)


def _check(options: Options) -> None:
    classes, most = options.num_classes, _VALIDATION_PER_CLASS * options.num_classes
    ranges = {
        "num_classes": (2, 1000, "ImageNet has 1,000"),
        "train_images": (classes, math.inf, "take one per class or more"),
        "validation_images": (1, most, "the official labels have 50 per class"),
        "min_size": (8, options.max_size, "max_size is the other bound"),
        "seed": (0, math.inf, "0 is the default"),
    }
    for name, (least, greatest, reason) in ranges.items():
        if not least <= (value := getattr(options, name)) <= greatest:
            raise ValueError(
                f"{name}={value} must lie in [{least}, {greatest}]; {reason}"
            )


def _make_train(options: Options, tar: pathlib.Path, scratch: pathlib.Path) -> None:
    synsets = imagenet_archives.synsets()[: options.num_classes]
    for synset in synsets:
        (scratch / synset).mkdir()
    # Through files: drawing goes round the classes, archiving takes one after another,
    # and the images may exceed the memory.
    for number, label, image in _images(options, "train"):
        synset = synsets[label]
        name = f"{synset}_{number // len(synsets) + 1}.JPEG"
        (scratch / synset / name).write_bytes(image)
    with tarfile.open(tar, "x") as outer:
        for synset in synsets:
            inner_tar = scratch / f"{synset}.tar"
            with tarfile.open(inner_tar, "x") as inner:
                for path in sorted((scratch / synset).iterdir()):
                    _add(inner, path.name, path.read_bytes())
            _add(outer, inner_tar.name, inner_tar.read_bytes())


def _make_validation(options: Options, tar: pathlib.Path) -> None:
    synsets = imagenet_archives.synsets()[: options.num_classes]
    numbers: dict[str, list[int]] = {synset: [] for synset in synsets}
    for number, synset in enumerate(imagenet_archives.validation_synsets(), 1):
        if synset in numbers:
            numbers[synset].append(number)
    with tarfile.open(tar, "x") as opened:
        for index, label, image in _images(options, "validation"):
            number = numbers[synsets[label]][index // len(synsets)]
            _add(opened, f"ILSVRC2012_val_{number:08}.JPEG", image)


def _add(tar: tarfile.TarFile, name: str, contents: bytes) -> None:
    member = tarfile.TarInfo(name)  # without time and owner, for equal bytes every time
    member.size = len(contents)
    tar.addfile(member, io.BytesIO(contents))


def _images(options: Options, split: Split) -> Iterator[tuple[int, int, bytes]]:
    """Yields number, label and encoded file of every image of a split."""
    config = strokes.Strokes(
        num_classes=options.num_classes, image_size=DRAWING_SIZE, seed=options.seed
    )
    count, drawn_split, odd = {
        "train": (options.train_images, "train", _odd_train),
        "validation": (options.validation_images, "test", _odd_validation),
    }[split]
    generator = np.random.default_rng((options.seed, strokes.SPLITS[drawn_split]))
    with tqdm.tqdm(desc=f"drawing {split}", total=count, disable=None) as bar:
        for start, images, labels in strokes.draw_blocks(config, drawn_split, count):
            for offset, drawing in enumerate(images):
                size = _size(generator, options)
                image = Image.fromarray(drawing).resize(size, Image.Resampling.BICUBIC)
                file = _encoded(image, odd(start + offset))
                yield start + offset, int(labels[offset]), file
            bar.update(len(images))


def _size(generator: np.random.Generator, options: Options) -> tuple[int, int]:
    """Draws width and height: the longer uniform, the shorter at least 0.6 of it."""
    longer = int(generator.integers(options.min_size, options.max_size + 1))
    shorter = max(options.min_size, int(longer * generator.uniform(0.6, 1.0)))
    upright = generator.uniform() < 0.5
    return (shorter, longer) if upright else (longer, shorter)


def _odd_train(number: int) -> Oddity | None:
    """Returns the oddity of a training image: one PNG, a few others in every 400."""
    if number == 1:
        return "png"
    few: dict[int, Oddity] = {0: "cmyk", 2: "grey", 3: "metadata", 4: "cmyk"}
    return few.get(number % 400)


def _odd_validation(number: int) -> Oddity | None:
    """Returns the oddity of a validation image: never CMYK or PNG, as officially."""
    few: dict[int, Oddity] = {0: "grey", 1: "metadata"}
    return few.get(number % 400)


def _encoded(image: Image.Image, oddity: Oddity | None) -> bytes:
    file = io.BytesIO()
    if oddity == "png":
        image.save(file, "PNG")
    elif oddity == "cmyk":
        image.convert("CMYK").save(file, "JPEG", quality=90)
    elif oddity == "grey":
        image.convert("L").save(file, "JPEG", quality=90)
    else:
        comment = bytes(60_000) if oddity == "metadata" else b""
        image.save(file, "JPEG", quality=90, comment=comment)
    return file.getvalue()


if __name__ == "__main__":
    main()
