"""Batches from the records of a split, resumable from one integer.

Training reads one endless stream of images,

    epoch 0 in a random order, epoch 1 in another, ...

in which each image has a *position*.  Batch ``k`` of ``B`` images holds the positions
``[kB, (k+1)B)``; of ``P`` processes, process ``p`` reads the slice
``[kB + pB/P, kB + (p+1)B/P)``.  Order and augmentation are functions of
``(seed, position)``, so a global batch is the same array for any number of processes,
no image is dropped at the end of an epoch, and the whole state of the pipeline is the
number of batches taken.

Images in memory are gathered a batch at a time; others are read and decoded in threads,
for decoding releases the interpreter lock, or in worker processes.
"""

import dataclasses
import os
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np

from experiments.data import loading, order, reading, splits
from lbopt import checks


class TrainingBatches(Iterator[loading.Batch]):
    """The endless stream of training batches, as one process sees it.

    Args:
      split: the records.
      batch_size: images in a *global* batch, over all processes.
      seed: seed of order and augmentation, in ``[0, 2**32)``.
      augmented: whether images are cropped and mirrored at random, as far as the
        split's ``Preprocessing`` allows; if not, they look as in evaluation.
      process_index: index of this process.
      process_count: number of processes that share a batch.
      num_threads: threads that read and decode images which are not in memory.
      num_workers: worker processes among which those threads are divided; 0 for
        threads of this process.  The batches are the same.
      dtype: dtype of the images.
      bad_images: for images on disk that cannot be decoded, ``"stop"`` raises
        ``decoding.RecordError`` and ``"blank"`` substitutes an image of the mean
        colour, with a warning.

    Raises:
      ValueError: if ``batch_size`` cannot be divided among the processes.
    """

    def __init__(
        self,
        split: splits.Split,
        *,
        batch_size: int,
        seed: int,
        augmented: bool = True,
        process_index: int = 0,
        process_count: int = 1,
        num_threads: int = 16,
        num_workers: int = 0,
        dtype: np.typing.DTypeLike = np.float32,
        bad_images: loading.BadImages = "stop",
    ):
        self._slices = order.Slices(batch_size, process_index, process_count)
        self._slices.check()
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed={seed} must lie in [0, 2**32); 0 is usual")
        positions = order.shuffled(len(split), seed)
        self._end = len(positions) // batch_size
        form = loading.Form(dtype, bad_images)
        self._load = loading.training_loader(split, seed, augmented, positions, form)
        self._pool = _pool(split, num_threads, num_workers)
        self._blanks = _Blanks(split)
        self._taken = 0
        self._running: list[grain.DatasetIterator] = []  # one, or none
        # At interpreter exit, too: grain's own finaliser would find its modules gone.
        weakref.finalize(self, _end, self._running)

    def __next__(self) -> loading.Batch:
        """Returns the next batch; after an error, the same batch is tried again."""
        if not self._running:
            span = range(self._taken, self._end)
            ahead = reading.batches(self._load, self._slices, span, **self._pool)
            self._running.append(iter(ahead))
        try:
            batch = self._blanks.counted(next(self._running[0]))
        except BaseException:
            self.close()  # grain does not say where it goes on after an error
            raise
        self._taken += 1
        return batch

    @property
    def bad_images(self) -> int:
        """Number of images replaced by blank ones."""
        return len(self._blanks)

    def get_state(self) -> int:
        """Returns the number of batches taken so far."""
        return self._taken

    def set_state(self, taken: int) -> None:
        """Continues as a new stream would after ``taken`` batches."""
        checks.whole("taken", taken, "0 begins anew", least=0)
        self.close()
        self._taken = taken

    def close(self) -> None:
        """Ends threads and worker processes; the next batch starts them again."""
        _end(self._running)


class EvaluationBatches:
    """A split once, in order; the last batch is padded, and ``mask`` is 0 on padding.

    All processes have the same number of batches, as collectives need, and each image
    counts in exactly one of them.  Iterable any number of times.

    Args:
      split: the records.
      batch_size: images in a global batch, over all processes.
      process_index: index of this process.
      process_count: number of processes that share a batch.
      num_threads: threads that read and decode images which are not in memory.
      dtype: dtype of the images.
      bad_images: as in ``TrainingBatches``.

    Raises:
      ValueError: if ``batch_size`` cannot be divided among the processes.
    """

    def __init__(
        self,
        split: splits.Split,
        *,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        num_threads: int = 16,
        dtype: np.typing.DTypeLike = np.float32,
        bad_images: loading.BadImages = "stop",
    ):
        slices = order.Slices(batch_size, process_index, process_count)
        slices.check()
        self._length = -(-len(split) // batch_size)
        self._ahead = reading.batches(
            loading.evaluation_loader(split, loading.Form(dtype, bad_images)),
            slices,
            range(self._length),
            # Without worker processes, which every pass would have to start anew.
            **_pool(split, num_threads, 0),
        )
        self._blanks = _Blanks(split)

    def __len__(self) -> int:
        """Number of batches."""
        return self._length

    def __iter__(self) -> Iterator[loading.Batch]:
        """Yields the batches of one pass."""
        iterator = iter(self._ahead)
        try:
            for batch in iterator:
                yield self._blanks.counted(batch)
        finally:
            iterator.close()

    @property
    def bad_images(self) -> int:
        """Number of images replaced by blank ones."""
        return len(self._blanks)


def batch_shapes(
    batch_size: int,
    image_shape: tuple[int, ...],
    dtype: np.typing.DTypeLike = np.float32,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of a training batch with images of ``dtype``."""
    return {
        "image": jax.ShapeDtypeStruct((batch_size, *image_shape), dtype),
        "label": jax.ShapeDtypeStruct((batch_size,), np.int32),
    }


@dataclasses.dataclass(frozen=True)
class Data:
    """The batches of a run and the numbers that follow from them.

    Attributes:
      train: endless stream of training batches.
      test: the test images, once.
      image_shape: height, width and channels of an image.
      num_classes: number of classes.
      steps_per_epoch: training images over the global batch size; need not be whole.
      train_images: number of training images; 0 if unknown.
      test_images: number of test images; 0 if unknown.
    """

    train: TrainingBatches
    test: EvaluationBatches
    image_shape: tuple[int, int, int]
    num_classes: int
    steps_per_epoch: float
    train_images: int = 0
    test_images: int = 0

    def steps(self, epochs: float) -> int:
        """Returns the whole number of steps nearest to ``epochs``, at least one."""
        return max(1, round(epochs * self.steps_per_epoch))


def open_data(
    dataset: str,
    data_dir: str | os.PathLike,
    *,
    batch_size: int,
    eval_batch_size: int,
    seed: int,
    augmented: bool = True,
    recipe: splits.Recipe = splits.DEFAULT_RECIPE,
    dtype: np.typing.DTypeLike = np.float32,
    num_threads: int = 16,
    num_workers: int = 0,
    bad_images: loading.BadImages = "stop",
) -> Data:
    """Opens the training and the test split of a data set, for this JAX process.

    Args:
      dataset: name in ``tensorflow_datasets``; see ``splits.open_split``.
      data_dir: directory that holds data sets.
      batch_size: training images in a global batch.
      eval_batch_size: test images in a global batch.
      seed: seed of order and augmentation.
      augmented: whether training images are cropped and mirrored at random.
      recipe: size, cropping and normalisation that differ from the data set's.
      dtype: dtype of the images; bfloat16 halves the bytes sent to the devices.
      num_threads: as in ``TrainingBatches``.
      num_workers: as in ``TrainingBatches``.
      bad_images: as in ``TrainingBatches``.

    Returns:
      Both splits, with their shapes and sizes.

    Raises:
      FileNotFoundError: if the data set is not prepared in ``data_dir``.
      RecordError: if a record file is not as long as it was when it was written.
      ValueError: if there is no such data set, or ``batch_size`` exceeds it.
    """
    train, test = (
        splits.open_split(dataset, split, data_dir, recipe=recipe)
        for split in ("train", splits.test_split(dataset))
    )
    if batch_size > len(train):
        raise ValueError(
            f"batch_size={batch_size} must be at most {len(train)}, the number of "
            "training images; choose a smaller one"
        )
    shared: dict[str, Any] = {
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "dtype": dtype,
        "num_threads": num_threads,
        "bad_images": bad_images,
    }
    return Data(
        train=TrainingBatches(
            train,
            batch_size=batch_size,
            seed=seed,
            augmented=augmented,
            num_workers=num_workers,
            **shared,
        ),
        test=EvaluationBatches(test, batch_size=eval_batch_size, **shared),
        image_shape=train.image_shape,
        num_classes=train.num_classes,
        steps_per_epoch=len(train) / batch_size,
        train_images=len(train),
        test_images=len(test),
    )


class _Blanks:
    """The records seen whose images were replaced; warns of each once."""

    def __init__(self, split: splits.Split):
        self._origin = split.origin
        self._seen: set[int] = set()

    def __len__(self) -> int:
        return len(self._seen)

    def counted(self, batch: loading.Batch) -> loading.Batch:
        """Removes and notes the batch's list of blank images."""
        for record in set(batch.pop(loading.BLANK).tolist()) - self._seen:
            self._seen.add(record)
            warnings.warn(
                f"{self._origin.describe(record)}: cannot be decoded; an image of the "
                "mean colour takes its place",
                stacklevel=3,
            )
        return batch


def _end(running: list[grain.DatasetIterator]) -> None:
    while running:
        running.pop().close()


def _pool(split: splits.Split, num_threads: int, num_workers: int) -> dict[str, int]:
    """Returns the numbers of threads and workers: none for images in memory."""
    if isinstance(split.records, splits.InMemory):
        return {"num_threads": 0, "num_workers": 0}
    return {"num_threads": num_threads, "num_workers": num_workers}
