"""From the records of a split to batches: what a run takes, and where it resumes.

Training reads one endless stream of images,

    epoch 0 in a random order, epoch 1 in another, ...

in which each image has a *position*. Batch `k` of `B` images holds the positions `[kB,
(k+1)B)`; of `P` processes, process `p` reads the slice `[kB + pB/P, kB + (p+1)B/P)`.
Order and augmentation are functions of `(seed, position)`, so a global batch is the
same array for any number of processes, no image is dropped at the end of an epoch, and
the whole state of the pipeline is one integer: the number of batches taken.

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


class TrainingBatches(Iterator[loading.Batch]):
    """The endless stream of training batches, as one process sees it.

    Args:
        split: What to read.
        batch_size: Images in a *global* batch, over all processes.
        seed: Seed of order and augmentation, in `[0, 2**32)`.
        augmented: Whether images are cropped and mirrored at random, as far as the
            split's `Preprocessing` allows; if not, they look as in evaluation.
        process_index: Which of the processes this is.
        process_count: How many processes read the stream together.
        num_threads: Threads that read and decode images which are not in memory.
        num_workers: Worker processes among which those threads are divided; 0 for
            threads of this process. The batches are the same.
        dtype: Of the images.
        bad_images: What to do about images that cannot be decoded, if they are not in
            memory: stop with a `decoding.RecordError`, or put an image of the mean
            colour in their place and warn.
        with_index: Whether batches hold the numbers of their records, as `index`.

    Raises:
        ValueError: If `batch_size` cannot be divided among the processes.
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
        with_index: bool = False,
    ):
        self._slices = order.Slices(batch_size, process_index, process_count)
        self._slices.check()
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {seed}")
        positions = order.shuffled(len(split), seed)
        self._end = len(positions) // batch_size
        form = loading.Form(dtype, bad_images, with_index)
        self._load = loading.training_loader(split, seed, augmented, positions, form)
        self._pool = _pool(split, num_threads, num_workers)
        self._blanks = _Blanks(split)
        self._taken = 0
        self._running: list[grain.DatasetIterator] = []  # one, or none
        # At exit too: left to itself, grain meets modules that are gone already.
        weakref.finalize(self, _end, self._running)

    def __next__(self) -> loading.Batch:
        """The next batch; after an error, the same batch once more."""
        if not self._running:
            span = range(self._taken, self._end)
            ahead = reading.batches(self._load, self._slices, span, **self._pool)
            self._running.append(iter(ahead))
        try:
            batch = self._blanks.counted(next(self._running[0]))
        except BaseException:
            self.close()  # where grain goes on after an error is left open
            raise
        self._taken += 1
        return batch

    @property
    def bad_images(self) -> int:
        """How many images have been replaced by blank ones."""
        return len(self._blanks)

    def get_state(self) -> int:
        """Number of batches taken so far.

        Returns:
            All that `set_state` needs to continue from here.
        """
        return self._taken

    def set_state(self, taken: int) -> None:
        """Continues as a new stream would after `taken` batches.

        Args:
            taken: What `get_state` returned.

        Raises:
            ValueError: If `taken` is negative.
        """
        if taken < 0:
            raise ValueError(f"taken must not be negative, got {taken}")
        self.close()
        self._taken = taken

    def close(self) -> None:
        """Ends threads and worker processes; the next batch starts them again."""
        _end(self._running)


class EvaluationBatches:
    """A split once, in order; the last batch is padded, and `mask` is 0 on the padding.

    All processes have the same number of batches, as collectives need, and each image
    counts in exactly one of them. Iterable any number of times.

    Args:
        split: What to read.
        batch_size: Images in a global batch, over all processes.
        process_index: Which of the processes this is.
        process_count: How many processes share the split.
        num_threads: Threads that read and decode images which are not in memory.
        dtype: Of the images.
        bad_images: As in `TrainingBatches`.
        with_index: As in `TrainingBatches`; the index of the padding is -1.

    Raises:
        ValueError: If `batch_size` cannot be divided among the processes.
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
        with_index: bool = False,
    ):
        slices = order.Slices(batch_size, process_index, process_count)
        slices.check()
        form = loading.Form(dtype, bad_images, with_index)
        self._length = -(-len(split) // batch_size)
        self._ahead = reading.batches(
            loading.evaluation_loader(split, form),
            slices,
            range(self._length),
            # Not in worker processes, which every pass would have to start anew.
            **_pool(split, num_threads, 0),
        )
        self._blanks = _Blanks(split)

    def __len__(self) -> int:
        """Number of batches."""
        return self._length

    def __iter__(self) -> Iterator[loading.Batch]:
        """A pass over the split."""
        iterator = iter(self._ahead)
        try:
            for batch in iterator:
                yield self._blanks.counted(batch)
        finally:
            iterator.close()

    @property
    def bad_images(self) -> int:
        """How many images have been replaced by blank ones."""
        return len(self._blanks)


def batch_shapes(
    batch_size: int,
    image_shape: tuple[int, ...],
    dtype: np.typing.DTypeLike = np.float32,
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of a training batch, given the type of its images."""
    return {
        "image": jax.ShapeDtypeStruct((batch_size, *image_shape), dtype),
        "label": jax.ShapeDtypeStruct((batch_size,), np.int32),
    }


@dataclasses.dataclass(frozen=True)
class Data:
    """The batches of a run and what follows from them.

    Attributes:
        train: The endless stream of training batches.
        test: The test images, once.
        image_shape: Height, width and channels of an image.
        num_classes: Number of classes.
        steps_per_epoch: Training images over the global batch size; need not be whole.
        train_images: Number of training images; 0 where nobody counted.
        test_images: Number of test images; 0 where nobody counted.
    """

    train: TrainingBatches
    test: EvaluationBatches
    image_shape: tuple[int, int, int]
    num_classes: int
    steps_per_epoch: float
    train_images: int = 0
    test_images: int = 0

    def steps(self, epochs: float) -> int:
        """The whole number of steps nearest to some epochs, at least one."""
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
    with_index: bool = False,
) -> Data:
    """Opens the training and the test split of a data set, for this JAX process.

    Args:
        dataset: Name in `tensorflow_datasets`; see `splits.open_split`.
        data_dir: Directory that holds data sets.
        batch_size: Training images in a global batch.
        eval_batch_size: Test images in a global batch.
        seed: Seed of order and augmentation.
        augmented: Whether training images are cropped and mirrored at random.
        recipe: Size, cropping and normalisation, where the run wants others than the
            data set's.
        dtype: Of the images; in bfloat16 half as many bytes travel to the devices.
        num_threads: As in `TrainingBatches`.
        num_workers: As in `TrainingBatches`.
        bad_images: As in `TrainingBatches`.
        with_index: As in `TrainingBatches`.

    Returns:
        The batches.

    Raises:
        FileNotFoundError: If the data set is not prepared in `data_dir`.
        RecordError: If a record file is not as long as it was when it was written.
        ValueError: If there is no such data set, or `batch_size` exceeds it.
    """
    train, test = (
        splits.open_split(dataset, split, data_dir, recipe=recipe)
        for split in ("train", splits.test_split(dataset))
    )
    if batch_size > len(train):
        raise ValueError(
            f"batch_size must be at most {len(train)}, the number of training images, "
            f"got {batch_size}"
        )
    shared: dict[str, Any] = {
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
        "dtype": dtype,
        "num_threads": num_threads,
        "bad_images": bad_images,
        "with_index": with_index,
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
    """The records seen whose images were replaced; each is told of once."""

    def __init__(self, split: splits.Split):
        self._origin = split.origin
        self._seen: set[int] = set()

    def __len__(self) -> int:
        return len(self._seen)

    def counted(self, batch: loading.Batch) -> loading.Batch:
        """The batch for the run."""
        for record in set(batch.pop(loading.BLANK).tolist()) - self._seen:
            self._seen.add(record)
            warnings.warn(
                f"{self._origin.describe(record)}: an image of the mean colour stands "
                "for one that cannot be decoded",
                stacklevel=3,
            )
        return batch


def _end(running: list[grain.DatasetIterator]) -> None:
    while running:
        running.pop().close()


def _pool(split: splits.Split, num_threads: int, num_workers: int) -> dict[str, int]:
    """Who reads; nobody else where batches are gathered in memory."""
    if isinstance(split.records, splits.InMemory):
        return {"num_threads": 0, "num_workers": 0}
    return {"num_threads": num_threads, "num_workers": num_workers}
