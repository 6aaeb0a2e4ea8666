"""Makes a small ImageNet of drawings, in archives laid out as the official ones.

    python experiments/made_imagenet.py ~/made_imagenet
    python experiments/made_imagenet.py ~/made_imagenet --num-classes 100

The images are the drawings of `experiments/data/strokes.py`, as JPEGs of varying size
and aspect, so the classes can be learnt: class `i` of the drawings is the synset of
label `i`. As in the official training set a few images are CMYK, one is a PNG named
.JPEG, some are grey, and some carry long metadata.

The label of a validation image follows from the number in its name, by the official
list, which names each class 50 times, in no order. So the made validation images have
those numbers, ascending but not consecutive, that belong to the made classes: labels
are right for whoever goes by the number, as `experiments/prepare_imagenet.py` does, and
there can be at most 50 a class. (TensorFlow's preparation goes by the position among
the sorted names; that is the same for the official archive alone.)
"""

import dataclasses
import io
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
"""Height and width of a drawing, in pixels, before it is given its size and aspect."""

_VALIDATION_PER_CLASS = 50  # how often the official list names a class


@dataclasses.dataclass(frozen=True)
class Options:
    """What to make."""

    directory: Annotated[pathlib.Path, tyro.conf.Positional]
    """Where the archives go; made if missing."""
    num_classes: int = 20
    """Classes, at most 1,000."""
    train_images: int = 2000
    """Training images, as many of each class; the last may get one less."""
    validation_images: int = 500
    """Validation images, at most 50 a class."""
    min_size: int = 60
    """Least height and width, in pixels."""
    max_size: int = 500
    """Greatest height and width, in pixels."""
    seed: int = 0
    """Chooses the drawings and their sizes."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Carries out a command line.

    Args:
        arguments: Without the program's name; `None` for those of the process.
    """
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

    Args:
        options: What to make, and where.

    Raises:
        ValueError: If an option cannot be meant; the message names it.
        FileExistsError: If there are archives already; they might be the official ones.
    """
    _check(options)
    directory = options.directory.expanduser()
    tars = {split: directory / name for split, name in imagenet_archives.TARS.items()}
    for path in tars.values():
        if path.exists():
            raise FileExistsError(f"{path} exists; name another directory")
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
        "num_classes": (2, 1000, "that many there are"),
        "train_images": (classes, None, "one a class"),
        "validation_images": (1, most, "the official labels name a class 50 times"),
        "min_size": (8, options.max_size, "less than max_size"),
        "seed": (0, None, "not negative"),
    }
    for name, (least, greatest, reason) in ranges.items():
        value = getattr(options, name)
        if value < least or (greatest is not None and value > greatest):
            bounds = f"at least {least}" if greatest is None else f"{least}..{greatest}"
            raise ValueError(f"{name} must be {bounds} ({reason}), got {value}")


def _make_train(options: Options, tar: pathlib.Path, scratch: pathlib.Path) -> None:
    synsets = imagenet_archives.synsets()[: options.num_classes]
    for synset in synsets:
        (scratch / synset).mkdir()
    # Drawn in turns, archived class by class; there may be more than memory holds.
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
    member = tarfile.TarInfo(name)  # without time and owner: the same bytes every time
    member.size = len(contents)
    tar.addfile(member, io.BytesIO(contents))


def _images(options: Options, split: Split) -> Iterator[tuple[int, int, bytes]]:
    """Number, label and file of every image of a split."""
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
    """Width and height: the longer side uniform, the shorter at least 0.6 of it."""
    longer = int(generator.integers(options.min_size, options.max_size + 1))
    shorter = max(options.min_size, int(longer * generator.uniform(0.6, 1.0)))
    upright = generator.uniform() < 0.5
    return (shorter, longer) if upright else (longer, shorter)


def _odd_train(number: int) -> Oddity | None:
    """What is odd about a training image: one is a PNG, a few in 400 something else."""
    if number == 1:
        return "png"
    few: dict[int, Oddity] = {0: "cmyk", 2: "grey", 3: "metadata", 4: "cmyk"}
    return few.get(number % 400)


def _odd_validation(number: int) -> Oddity | None:
    """As in the official set, no validation image is CMYK or a PNG."""
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
