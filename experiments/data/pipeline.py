"""From the records of a split to batches: order, slicing, augmentation, resuming.

Training reads one endless stream of images,

    epoch 0 in a random order, epoch 1 in another, ...

in which each image has a *position*. Batch `k` of `B` images holds the positions `[kB,
(k+1)B)`; of `P` processes, process `p` reads those with `position % P == p`. Order and
augmentation are functions of `(seed, position)`, so a global batch is the same set of
images for any number of processes, no image is dropped at the end of an epoch, and the
whole state of the pipeline is one integer: the number of batches taken.

Images in memory are gathered a batch at a time; others are read and decoded in threads.
Threads and not worker processes, because decoding releases the interpreter lock, and
because grain's worker processes read absl flags, which nobody has parsed in a script
that was not started through absl.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence

import cv2
import grain
import jax
import numpy as np

from experiments.data import augment, splits

Batch = dict[str, np.ndarray]
"""`image` float32 `[b, h, w, c]`, `label` int32 `[b]`; testing, `mask` `[b]`."""

_Load = Callable[[Sequence], Batch]

_CAFFE_STD = (256 / 255, 256 / 255, 256 / 255)  # values / 256, not / 255
_Crop = Callable[[bytes, int], np.ndarray]

_EPOCHS = 1 << 32  # of the endless stream


class TrainingBatches(Iterator[Batch]):
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
    ):
        _check_division(batch_size, process_index, process_count)
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {seed}")
        order = grain.MapDataset.range(len(split)).seed(seed).shuffle()
        # Not `repeat()`, whose length, the largest index there is, overflows when it
        # is divided into groups of one image.
        order = order.repeat(_EPOCHS)
        order = order.map_with_index(lambda position, record: (record, position))
        self._order = order[process_index::process_count]
        self._batch_size = batch_size // process_count
        self._num_threads = _threads(split, num_threads)
        self._load = _training_loader(split, seed, augmented)
        self.set_state(0)

    def __next__(self) -> Batch:
        """The next batch."""
        batch = next(self._iterator)
        self._taken += 1
        return batch

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
        rest = self._order[taken * self._batch_size :]
        batches = _batched(rest, self._batch_size, self._load, self._num_threads)
        self._iterator = iter(batches)
        self._taken = taken


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
    ):
        _check_division(batch_size, process_index, process_count)
        self._length = -(-len(split) // batch_size)
        order = grain.MapDataset.range(self._length * batch_size)
        self._batches = _batched(
            order[process_index::process_count],
            batch_size // process_count,
            _evaluation_loader(split),
            _threads(split, num_threads),
        )

    def __len__(self) -> int:
        """Number of batches."""
        return self._length

    def __iter__(self) -> Iterator[Batch]:
        """A pass over the split."""
        return iter(self._batches)


def batch_shapes(
    batch_size: int, image_shape: tuple[int, ...]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of a training batch."""
    return {
        "image": jax.ShapeDtypeStruct((batch_size, *image_shape), np.float32),
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
    """

    train: TrainingBatches
    test: EvaluationBatches
    image_shape: tuple[int, int, int]
    num_classes: int
    steps_per_epoch: float

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

    Returns:
        The batches.

    Raises:
        FileNotFoundError: If the data set is not prepared in `data_dir`.
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
    process: dict[str, int] = {
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    return Data(
        train=TrainingBatches(
            train, batch_size=batch_size, seed=seed, augmented=augmented, **process
        ),
        test=EvaluationBatches(test, batch_size=eval_batch_size, **process),
        image_shape=train.image_shape,
        num_classes=train.num_classes,
        steps_per_epoch=len(train) / batch_size,
    )


def _check_division(batch_size: int, process_index: int, process_count: int) -> None:
    if not 0 <= process_index < process_count:
        raise ValueError(
            f"process_index must be in [0, {process_count}), got {process_index}"
        )
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size must be a positive multiple of the {process_count} "
            f"process(es), got {batch_size}"
        )


def _threads(split: splits.Split, num_threads: int) -> int:
    """Threads for reading and decoding; 0 where batches are gathered in memory."""
    return 0 if isinstance(split.records, splits.InMemory) else num_threads


def _batched(
    order: grain.MapDataset, batch_size: int, load: _Load, num_threads: int
) -> grain.IterDataset:
    """Batches of `load`ed items, prefetched; see `_threads` for `num_threads`."""
    if not num_threads:
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return order.batch(batch_size, batch_fn=load).to_iter_dataset(ahead)
    # A thread takes a few images at a time: of small ones, each alone costs as much.
    group = math.gcd(batch_size, 16)
    ahead = grain.ReadOptions(num_threads, prefetch_buffer_size=2 * batch_size // group)
    groups = order.batch(group, batch_fn=load).to_iter_dataset(ahead)
    return groups.batch(batch_size // group, batch_fn=_concatenated)


def _concatenated(batches: Sequence[Batch]) -> Batch:
    return {key: np.concatenate([b[key] for b in batches]) for key in batches[0]}


def _training_loader(split: splits.Split, seed: int, augmented: bool) -> _Load:
    """Loads items `(record, position)`; records count on from epoch to epoch."""
    preprocessing, recipe = split.preprocessing, split.recipe
    crop = _random_crop(split, seed) if augmented else _centre_crop(split)

    def load(items: Sequence[tuple[int, int]]) -> Batch:
        indices, positions = np.array(items, np.int64).T
        images, labels = _fetched(split, indices % len(split), positions, crop)
        if augmented and split.fixed_size:
            images = augment.pad_crop_flip(
                images,
                positions,
                seed,
                pad=preprocessing.pad,
                flip=preprocessing.flip,
                border=recipe.border,
            )
        return {"image": _finished(images, split), "label": labels}

    return load


def _evaluation_loader(split: splits.Split) -> _Load:
    """Loads record numbers; those past the end are padding."""
    crop = _centre_crop(split)

    def load(items: Sequence[int]) -> Batch:
        positions = np.array(items, np.int64)
        real = positions < len(split)
        # The padding repeats record 0: any image will do that cannot become NaN.
        indices = np.where(real, positions, 0)
        images, labels = _fetched(split, indices, positions, crop)
        return {
            "image": _finished(images, split),
            "label": labels,
            "mask": real.astype(np.float32),
        }

    return load


def _random_crop(split: splits.Split, seed: int) -> _Crop:
    """The random part of an encoded image that training at a position sees."""
    size, plain = split.image_shape[0], split.recipe.crop == "plain"
    cropped = augment.random_squashed_crop if plain else augment.random_resized_crop
    return lambda encoded, position: cropped(_decoded(encoded), position, seed, size)


def _centre_crop(split: splits.Split) -> _Crop:
    """The part of an encoded image that evaluation sees, whatever its position."""
    size, plain = split.image_shape[0], split.recipe.crop == "plain"
    cropped = augment.centre_squashed_crop if plain else augment.centre_crop
    return lambda encoded, position: cropped(_decoded(encoded), size)


def _fetched(
    split: splits.Split, indices: np.ndarray, positions: np.ndarray, crop: _Crop
) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 `[b, h, w, c]` and labels int32 `[b]` of the given records.

    Images of varying size are cropped to that of the model; others are as on disk.
    """
    records = split.records
    if isinstance(records, splits.InMemory):
        return records.images[indices], records.labels[indices]
    rows = records.__getitems__([int(index) for index in indices])
    images = [row["image"] for row in rows]
    if not split.fixed_size:
        pairs = zip(images, positions, strict=True)
        images = [crop(encoded, int(position)) for encoded, position in pairs]
    return np.stack(images), np.array([row["label"] for row in rows], np.int32)


def _decoded(encoded: bytes) -> np.ndarray:
    """RGB pixels uint8 `[h, w, 3]` of a JPEG or PNG; grey and CMYK are converted."""
    pixels = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        raise ValueError(
            "a record's image is neither a JPEG nor a PNG that can be read"
        )
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def _finished(images: np.ndarray, split: splits.Split) -> np.ndarray:
    """The cropped or augmented images at the model's size, float32, normalised."""
    if images.shape[1:] != split.image_shape:
        # A batch at a time: the records in memory stay small.
        images = augment.resize(images, split.image_shape[0])
    if split.recipe.normalise == "image":
        return _standardised(images)
    preprocessing = split.preprocessing
    if split.recipe.normalise == "caffe":
        return _normalised(images, preprocessing.mean, _CAFFE_STD)
    return _normalised(images, preprocessing.mean, preprocessing.std)


def _standardised(images: np.ndarray) -> np.ndarray:
    """float32 images of mean 0 and variance 1, each by its own mean and deviation.

    As `tf.image.per_image_standardization` of float images with values up to 255: the
    deviation of a nearly uniform image of `n` numbers is taken as `1 / sqrt(n)`.
    """
    rows = images.reshape(len(images), -1).astype(np.float32)
    rows -= rows.mean(1, keepdims=True)
    least = np.float32(rows.shape[1] ** -0.5)
    rows /= np.maximum(rows.std(1, keepdims=True), least)
    return rows.reshape(images.shape)


def _normalised(
    images: np.ndarray,
    mean: tuple[float, float, float],
    std: tuple[float, float, float],
) -> np.ndarray:
    """float32 images less a mean and over a deviation of each channel, of 1."""
    deviation = np.asarray(std, np.float32)
    scale = np.float32(1 / 255) / deviation
    shift = np.asarray(mean, np.float32) / deviation
    normalised = images.astype(np.float32)
    normalised *= scale
    normalised -= shift
    return normalised
