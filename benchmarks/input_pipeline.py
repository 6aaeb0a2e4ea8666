"""Throughput of the input pipeline, beside that of decoding and cropping alone.

    python -m benchmarks.input_pipeline [--rounds 5]

Synthetic photographs (1/f noise, JPEGs of ImageNet's size in pixels and bytes) are
written as ArrayRecord and read through ``experiments.data`` as ImageNet would be.  The
stages grow from decoding alone to the whole pipeline; they take turns, each on one core
and on two, and a ratio always divides turns of the same round.  Work in this process is
counted in CPU seconds as well, which depend less on the machine's other work.
"""

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

from benchmarks import harness, timing
from experiments.data import augment, decoding, loading, order, pipeline, splits

_SETTINGS = {"quality": 90, "crop": 224, "group": 16, "dtype": "float32"}
LIMIT = "decode and crop"
THREADS = "pipeline, threads"
WORKERS = "pipeline, workers"


class Sizes(NamedTuple):
    """The sizes of a run; images in a turn are a multiple of the group, 16."""

    batches: int = 4  # in a turn
    batch: int = 128
    jpegs: int = 96  # different photographs
    records: int = 1024  # in which they recur
    threads: int = 4
    workers: int = 2  # processes


class NoisePhotographs(tfds.core.GeneratorBasedBuilder):
    """Noise with the spectrum, the pixels and the bytes of ImageNet's photographs."""

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
    """Returns a JPEG of 330 to 460 by 400 to 560 pixels, 115 kB on average."""
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
    """The throughput of a stage in its turn."""

    stage: str
    cores: int
    rate: float  # images a second
    cpu_rate: float | None  # images a CPU second; None if other processes take part


def measure(rounds: int, sizes: Sizes | None = None) -> harness.Record:
    """Makes the photographs and lets all stages take turns."""
    sizes = sizes or Sizes()
    cores = sorted(os.sched_getaffinity(0))[:2]
    tfds.disable_progress_bar()
    turns = []
    with tempfile.TemporaryDirectory() as folder:
        harness.tell("making photographs")
        builder = NoisePhotographs(
            jpegs=sizes.jpegs, records=sizes.records, data_dir=folder
        )
        builder.download_and_prepare(file_format="array_record")
        split = splits.open_split(builder.name, "train", folder)
        files = [split.read(record)["image"] for record in range(sizes.jpegs)]
        for number in range(rounds):
            harness.tell(f"round {number + 1} of {rounds}")
            for count in range(1, len(cores) + 1):
                with _pinned(cores[:count]):
                    for stage, run in _parts(split, files).items():
                        turns.append(_alone(stage, run, sizes, count))
                    turns.append(_streamed(THREADS, split, sizes, count, workers=0))
                    if workers := sizes.workers:
                        turns.append(_streamed(WORKERS, split, sizes, count, workers))
    return {
        "rounds": rounds,
        **sizes._asdict(),
        "mean_bytes": float(np.mean([len(file) for file in files])),
        "turns": [turn._asdict() for turn in turns],
    }


def _parts(
    split: splits.Split, files: Sequence[bytes]
) -> dict[str, Callable[[np.ndarray], object]]:
    """Returns the stages up to batches, as functions of a group of positions."""
    numbers = order.shuffled(len(split), 0)
    draws = augment.uniforms(0, np.arange(256), augment.RESIZED_CROP_DRAWS)

    def decode(positions: np.ndarray) -> None:
        for i in positions:
            decoding.decode(files[i % len(files)])

    def crop(file: bytes, position: int) -> None:
        pixels = decoding.decode(file)
        assert pixels is not None
        draw = draws[position % len(draws)]
        augment.random_resized_crop(pixels, draw, _SETTINGS["crop"])

    def decode_and_crop(positions: np.ndarray) -> None:
        for i in positions:
            crop(files[i % len(files)], i)

    def read_too(positions: np.ndarray) -> None:
        for i in positions:
            crop(split.read(int(i) % len(split))["image"], i)

    return {
        "decode": decode,
        LIMIT: decode_and_crop,
        "+ read": read_too,
        "+ normalise and batch": loading.training_loader(
            split, 0, True, numbers, loading.Form()
        ),
    }


def _alone(
    stage: str, run: Callable[[np.ndarray], object], sizes: Sizes, cores: int
) -> Turn:
    """Times a stage with one thread a core."""
    images = sizes.batches * sizes.batch
    groups = np.arange(images).reshape(-1, _SETTINGS["group"])
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        start, cpu = time.perf_counter(), time.process_time()
        list(pool.map(run, groups))
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return Turn(stage, cores, images / seconds, images / cpu)


def _streamed(
    stage: str, split: splits.Split, sizes: Sizes, cores: int, workers: int
) -> Turn:
    """Times the whole pipeline, whose consumer waits at the start and at the end."""
    images = sizes.batches * sizes.batch
    batches = pipeline.TrainingBatches(
        split,
        batch_size=sizes.batch,
        seed=0,
        num_threads=sizes.threads,
        num_workers=workers,
    )
    next(batches)
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(sizes.batches):
        next(batches)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    batches.close()
    return Turn(stage, cores, images / seconds, None if workers else images / cpu)


@contextlib.contextmanager
def _pinned(cores: Sequence[int]) -> Iterator[None]:
    """Keeps this thread, and threads and processes that it starts, on ``cores``."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def summary(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Summarises each stage over the rounds.

    Args:
      record: the result of ``measure``.

    Returns:
      For each stage its ``name``, images a second on one core (``rate``) and a CPU
      second (``cpu_rate``), their ``share`` of the limit's in the same round, the
      ``scaling`` to two cores, and ``microseconds`` of CPU an image if known.
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
    """Formats a record."""
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
    return harness.page(
        f"JPEGs of {record['mean_bytes'] / 1e3:.0f} kB on average, batches of "
        f"{record['batch']}, {record['threads']} threads, {record['workers']} "
        f"workers; the limit is `{LIMIT}`, in CPU time where that is known",
        rows,
    )


main = harness.command(
    "input_pipeline",
    __doc__,
    measure,
    table,
    _SETTINGS,
    rounds=(5, "rounds in which each stage has a turn"),
)

if __name__ == "__main__":
    main()
