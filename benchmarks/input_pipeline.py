"""Images a second of the input pipeline, beside what decoding and cropping alone allow.

    python -m benchmarks.input_pipeline [--rounds 5] [--output figures.json]

Photographs are made (1/f noise, JPEGs of ImageNet's size in pixels and bytes), written
as ArrayRecord and read through ``experiments.data`` as ImageNet would be.  From stage
to stage the work grows from decoding alone to the whole pipeline; the stages take
turns, each on one core and on two, and a ratio always divides turns of the same round.
What runs in this process is counted in CPU seconds as well, which other work on the
machine disturbs less than the wall time.
"""

import argparse
import concurrent.futures
import contextlib
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np
import tensorflow_datasets as tfds

from benchmarks import reporting, timing
from experiments.data import augment, decoding, loading, order, pipeline, splits

_SIZES = {
    "rounds": (5, "rounds in which each stage has a turn"),
    "batches": (4, "batches in a turn"),
    "batch": (128, "images in a batch"),
    "jpegs": (96, "different photographs"),
    "records": (1024, "records, in which they recur"),
    "threads": (4, "reading threads"),
}
_SETTINGS = {"quality": 90, "crop": 224, "group": 16, "dtype": "float32"}
LIMIT = "decode and crop"
THREADS = "pipeline, threads"
WORKERS = "pipeline, workers"


class NoisePhotographs(tfds.core.GeneratorBasedBuilder):
    """Noise with the spectrum, the pixels and the bytes of ImageNet's photographs.

    Args:
      jpegs: different photographs; none is needed to read.
      records: in how many records they recur.
      **settings: of the base class.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, jpegs: int = 0, records: int = 0, **settings: Any):
        self._jpegs, self._records = jpegs, records
        super().__init__(**{"file_format": "array_record", **settings})

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(num_classes=1000),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        random = np.random.default_rng(0)
        files = [photograph(random) for _ in range(self._jpegs)]
        for i in range(self._records):
            yield i, {"image": io.BytesIO(files[i % self._jpegs]), "label": i % 1000}


def photograph(random: np.random.Generator) -> bytes:
    """A JPEG of quality 90, 330 to 460 by 400 to 560 pixels, of 115 kB in the mean."""
    height, width = int(random.integers(330, 461)), int(random.integers(400, 561))
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = 1
    shape = (3, *frequency.shape)
    spectrum = (random.normal(size=shape) + 1j * random.normal(size=shape)) / frequency
    noise = np.fft.irfft2(spectrum, s=(height, width))
    noise -= noise.mean((1, 2), keepdims=True)
    noise *= 40 / noise.std((1, 2), keepdims=True)
    image = np.clip(128 + noise, 0, 255).astype(np.uint8).transpose(1, 2, 0)
    flags = [cv2.IMWRITE_JPEG_QUALITY, _SETTINGS["quality"]]
    return cv2.imencode(".jpg", image, flags)[1].tobytes()


class Turn(NamedTuple):
    """What a stage did in its turn.

    Attributes:
      stage: its name.
      cores: how many it had.
      rate: images a second of wall time.
      cpu_rate: images a CPU second, where no other process takes part.
    """

    stage: str
    cores: int
    rate: float
    cpu_rate: float | None


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measures, prints tables, writes the record.

    Args:
      argv: arguments of the command line; those of the process by default.

    Returns:
      The record, as it is written to ``--output``.
    """
    options = _parse(argv)
    record = reporting.begin("input_pipeline", argv, _SETTINGS)
    tfds.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        reporting.tell("making photographs")
        builder = NoisePhotographs(
            jpegs=options.jpegs, records=options.records, data_dir=folder
        )
        builder.download_and_prepare(file_format="array_record")
        split = splits.open_split(builder.name, "train", folder)
        record |= measure(split, options)
    reporting.write(record, options.output)
    print(table(record))
    return record


def measure(split: splits.Split, options: argparse.Namespace) -> dict[str, Any]:
    """Lets all stages take turns.

    Args:
      split: what they read.
      options: of the command line.

    Returns:
      Their part of the record.
    """
    cores = sorted(os.sched_getaffinity(0))[:2]
    turns = []
    for number in range(options.rounds):
        reporting.tell(f"round {number + 1} of {options.rounds}")
        for count in range(1, len(cores) + 1):
            with _pinned(cores[:count]):
                turns += [_alone(*stage, count) for stage in _parts(split, options)]
                turns.append(_streamed(THREADS, split, options, count))
                if options.workers:
                    turns.append(_streamed(WORKERS, split, options, count))
    sizes = [len(split.read(i)["image"]) for i in range(min(len(split), options.jpegs))]
    return {
        **reporting.sizes(options, _SIZES),
        "workers": options.workers,
        "mean_bytes": float(np.mean(sizes)),
        "turns": [turn._asdict() for turn in turns],
    }


class _Part(NamedTuple):
    """A part of the pipeline as one function of a group of positions."""

    name: str
    run: Callable[[np.ndarray], object]
    images: int


def _parts(split: splits.Split, options: argparse.Namespace) -> list[_Part]:
    """Stages without the pipeline, each with what those before it do."""
    files = [split.read(record)["image"] for record in range(options.jpegs)]
    numbers = order.shuffled(len(split), 0)
    draws = augment.uniforms(0, np.arange(256), augment.RESIZED_CROP_DRAWS)
    load = loading.training_loader(split, 0, True, numbers, loading.Form())

    def decode(positions: np.ndarray) -> None:
        for i in positions:
            decoding.decode(files[i % len(files)])

    def crop(pixels: np.ndarray | None, position: int) -> None:
        assert pixels is not None
        augment.random_resized_crop(pixels, draws[position % len(draws)], 224)

    def decode_and_crop(positions: np.ndarray) -> None:
        for i in positions:
            crop(decoding.decode(files[i % len(files)]), i)

    def read_too(positions: np.ndarray) -> None:
        for i in positions:
            crop(decoding.decode(split.read(int(i) % len(split))["image"]), i)

    images = options.batches * options.batch
    return [
        _Part("decode", decode, images),
        _Part(LIMIT, decode_and_crop, images),
        _Part("+ read", read_too, images),
        _Part("+ normalise and batch", load, images),
    ]


def _alone(
    name: str, run: Callable[[np.ndarray], object], images: int, cores: int
) -> Turn:
    """Times a part with one thread a core."""
    groups = np.arange(images).reshape(-1, _SETTINGS["group"])
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        start, cpu = time.perf_counter(), time.process_time()
        list(pool.map(run, groups))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return Turn(name, cores, images / seconds, images / cpu)


def _streamed(
    name: str, split: splits.Split, options: argparse.Namespace, cores: int
) -> Turn:
    """Times the whole pipeline, whose consumer waits at the start and at the end."""
    workers = options.workers if name == WORKERS else 0
    batches = pipeline.TrainingBatches(
        split,
        batch_size=options.batch,
        seed=0,
        num_threads=options.threads,
        num_workers=workers,
    )
    next(batches)
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(options.batches):
        next(batches)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    batches.close()
    images = options.batches * options.batch
    return Turn(name, cores, images / seconds, None if workers else images / cpu)


@contextlib.contextmanager
def _pinned(cores: Sequence[int]) -> Iterator[None]:
    """Keeps this thread, and what it starts, on some cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def summary(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The stages, with medians over the rounds.

    Args:
      record: what ``measure`` returned.

    Returns:
      For each stage: its ``name``, images a second on one core (``rate``) and a CPU
      second (``cpu_rate``), their ``share`` of the limit's in the same round, the
      ``scaling`` to two cores, and ``microseconds`` of CPU an image where known.
    """
    turns = [Turn(**turn) for turn in record["turns"]]
    names = list(dict.fromkeys(turn.stage for turn in turns))

    def rates(name: str, cores: int, field: str = "rate") -> list[float]:
        chosen = [t for t in turns if (t.stage, t.cores) == (name, cores)]
        return [getattr(t, field) for t in chosen]

    def entry(name: str) -> dict[str, Any]:
        one, two = rates(name, 1), rates(name, 2)
        cpu = rates(name, 1, "cpu_rate")
        known = None not in cpu
        limit = rates(LIMIT, 1, "cpu_rate" if known else "rate")
        return {
            "name": name,
            "rate": timing.spread(one),
            "cpu_rate": timing.spread(cpu) if known else None,
            "share": _ratios(cpu if known else one, limit),
            "scaling": _ratios(two, one) if two else None,
            "microseconds": 1e6 / timing.spread(cpu).median if known else None,
        }

    return [entry(name) for name in names]


def _ratios(numbers: Sequence[float], others: Sequence[float]) -> timing.Spread:
    return timing.spread([a / b for a, b in zip(numbers, others, strict=True)])


def table(record: dict[str, Any]) -> str:
    """The table of a record.

    Args:
      record: what ``measure`` returned.

    Returns:
      Text of several lines.
    """
    head = ("", "images/s, 1 core", "a CPU s", "of the limit", "2 cores / 1")
    rows: list[tuple[str, ...]] = [(*head, "µs more an image")]
    before = 0.0
    for entry in summary(record):
        own, cpu, scaling = (entry[k] for k in ("microseconds", "cpu_rate", "scaling"))
        more = "" if own is None else f"{own - before:.0f}"
        before = own or before
        rows.append(
            (
                entry["name"],
                f"{entry['rate'].median:.0f}",
                "" if cpu is None else f"{cpu.median:.0f}",
                str(entry["share"]),
                "" if scaling is None else str(scaling),
                more,
            )
        )
    return "\n".join(
        [
            "",
            f"JPEGs of {record['mean_bytes'] / 1e3:.0f} kB in the mean, batches of "
            f"{record['batch']}, {record['threads']} threads, {record['workers']} "
            f"workers; the limit is `{LIMIT}`, in CPU time where it is known",
            *reporting.aligned(rows),
        ]
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = reporting.arguments("input_pipeline", __doc__)
    reporting.add_sizes(parser, _SIZES)
    parser.add_argument("--workers", type=int, default=2, help="worker processes")
    options = parser.parse_args(argv)
    images = options.batch * options.batches
    if images % _SETTINGS["group"]:
        parser.error(f"--batch times --batches must be a multiple of 16, not {images}")
    return options


if __name__ == "__main__":
    main()
