"""Batches from TFRecord files, read and decoded by TensorFlow's `tf.data`.

For those who own a data set that `tensorflow_datasets` prepared as TFRecord. Only this
module imports TensorFlow, and it is imported only where `reader="tf_data"` is asked
for. It crops, shifts, mirrors and normalises as `loading` does, by the same random
numbers: an image at a position of the stream looks the same up to the rounding of
pixels. What differs is the order, for a TFRecord file can only be read from its start:

- Process `p` of `P` reads a fixed `P`-th of the split in each epoch, so a global batch
  depends on the number of processes, and images stay with their process.
- An epoch is a random order of the files, of which some are read in turns, and then a
  random draw from a buffer of records. All of it follows from `(seed, epoch)`, so the
  state is, as in `pipeline`, the number of batches taken.
- To resume in the middle of an epoch, its records are read again from the start.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from experiments.data import augment, decoding, loading, order, splits

try:
    import tensorflow as tf
except ModuleNotFoundError as error:
    if error.name != "tensorflow":
        raise
    raise ValueError(
        "reader=tf_data needs TensorFlow: pip install 'lbopt[tf]'; or prepare the data "
        "set as array_record, for reader=array_record"
    ) from error

from experiments.data import tf_augment, tf_splits

_CYCLE, _BLOCK = 16, 16  # files read in turns, and records of each at a turn
_EPOCHS = 1 << 31  # of the endless stream


class TfTrainingBatches(Iterator[loading.Batch]):
    """The endless stream of training batches, as one process sees it.

    It goes on bit for bit the same after `set_state`. The first batch after that takes
    longer, for what this process had taken of the epoch is read again, though not
    decoded: ten times faster than it was taken, by a core that read 3,500 images of 126
    kB in a second and decoded 350.

    Args:
        split: What to read.
        batch_size: Images in a *global* batch, over all processes.
        seed: Seed of order and augmentation, in `[0, 2**32)`.
        augmented: Whether images are cropped and mirrored at random, as far as the
            split's `Preprocessing` allows; if not, they look as in evaluation.
        process_index: Which of the processes this is.
        process_count: How many processes read the stream together.
        num_threads: Threads that decode.
        dtype: Of the images.
        with_index: Whether batches hold the numbers of their records, as `index`.
        shuffle_buffer: Records, still encoded, of which the next is one at random: of
            ImageNet's, 16,384 take 1.8 GB in each process. A file that holds one class
            after the other needs more.

    Raises:
        ValueError: If `batch_size` cannot be divided among the processes, or another
            number is out of range.
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
        dtype: np.typing.DTypeLike = np.float32,
        with_index: bool = False,
        shuffle_buffer: int = 16_384,
    ):
        slices = order.Slices(batch_size, process_index, process_count)
        slices.check()
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {seed}")
        if shuffle_buffer < 1:
            raise ValueError(f"shuffle_buffer must be positive, got {shuffle_buffer}")
        form = loading.Form(dtype, with_index=with_index)
        self._reader = _Reader(split, slices, augmented, form, num_threads)
        self._seed = seed
        self._shuffle_buffer = shuffle_buffer
        self._iterator: Iterator[loading.Batch] | None = None
        self._taken = 0

    def __next__(self) -> loading.Batch:
        """The next batch; after an error, the same batch once more."""
        if self._iterator is None:
            images = self._reader.decoded(self._images(tf_splits.read))
            self._iterator = _iterator(self._reader.batched(images))
        try:
            batch = next(self._iterator)
        except tf.errors.OpError as error:
            self.close()
            raise self._reader.explained(error, self._images(_numbers)) from error
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
        self.close()
        self._taken = taken

    def close(self) -> None:
        """Ends reading ahead; the next batch starts it again."""
        self._iterator = None

    def _images(self, read: "_Read") -> tf.data.Dataset:
        """Records and random numbers from the next batch on."""
        slices, share = self._reader.slices, self._reader.share
        first = self._taken * slices.local_size
        epoch, offset = divmod(first, sum(part.take for part in share))

        def seed_of(epoch: np.ndarray) -> np.int64:
            number = epoch * slices.process_count + slices.process_index
            draw = augment.uniforms(self._seed, number[None], 1)[0, 0]
            return np.int64(draw * 2.0**53)

        def records(epoch: tf.Tensor) -> tf.data.Dataset:
            seed = tf.numpy_function(seed_of, [epoch], tf.int64, stateful=False)
            shuffling = {
                "seed": tf.ensure_shape(seed, []),
                "reshuffle_each_iteration": False,
            }
            files = _files(share).shuffle(len(share), **shuffling)
            read_in_turns = _interleaved(files, len(share), read)
            return read_in_turns.shuffle(self._shuffle_buffer, **shuffling)

        endless = tf.data.Dataset.range(epoch, _EPOCHS).flat_map(records).skip(offset)
        draws = tf_augment.uniforms(self._seed, slices, self._reader.draws, self._taken)
        return tf.data.Dataset.zip(endless, draws)


class TfEvaluationBatches:
    """A split once; the last batches are padded, and `mask` is 0 on the padding.

    All processes have the same number of batches, as collectives need, and each image
    counts in exactly one of them: of `P` processes each reads a `P`-th of the split, or
    one image more. Iterable any number of times, in the same order.

    Args:
        split: What to read.
        batch_size: Images in a global batch, over all processes.
        process_index: Which of the processes this is.
        process_count: How many processes share the split.
        num_threads: Threads that decode.
        dtype: Of the images.
        with_index: Whether batches hold the numbers of their records, as `index`; that
            of the padding is -1.

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
        with_index: bool = False,
    ):
        slices = order.Slices(batch_size, process_index, process_count)
        slices.check()
        form = loading.Form(dtype, with_index=with_index)
        self._reader = _Reader(split, slices, False, form, num_threads)
        self._length = -(-len(split) // batch_size)
        self._batches = self._padded_batches()

    def __len__(self) -> int:
        """Number of batches."""
        return self._length

    def __iter__(self) -> Iterator[loading.Batch]:
        """A pass over the split."""
        iterator = _iterator(self._batches)
        for number in range(self._length):
            try:
                batch = next(iterator)
            except tf.errors.OpError as error:
                rest = self._images(_numbers).skip(
                    number * self._reader.slices.local_size
                )
                raise self._reader.explained(error, rest) from error
            yield batch

    def _padded_batches(self) -> tf.data.Dataset:
        images = self._reader.decoded(self._images(tf_splits.read))
        images = images.map(lambda image: {**image, "mask": tf.ones([])})
        specs: Any = images.element_spec
        padding = {key: tf.zeros(s.shape, s.dtype) for key, s in specs.items()}
        if "index" in padding:
            padding["index"] -= 1
        padded = images.concatenate(tf.data.Dataset.from_tensors(padding).repeat())
        size = self._reader.slices.local_size
        return self._reader.batched(padded.take(self._length * size))

    def _images(self, read: "_Read") -> tf.data.Dataset:
        """Records, and the random numbers that are none."""
        share = self._reader.share
        records = _interleaved(_files(share), len(share), read)
        draws = tf_augment.uniforms(0, self._reader.slices, 0, 0)
        return tf.data.Dataset.zip(records, draws)


def open_split(
    name: str,
    split: str,
    data_dir: str | os.PathLike,
    *,
    recipe: splits.Recipe = splits.DEFAULT_RECIPE,
) -> splits.Split:
    """As `tf_splits.open_split`; and TensorFlow leaves the GPUs to JAX."""
    tf.config.set_visible_devices([], "GPU")
    return tf_splits.open_split(name, split, data_dir, recipe=recipe)


_Read = Callable[..., tf.data.Dataset]
"""From the fields of a `tf_splits.Part` to its records: their numbers and contents."""


class _Reader:
    """What reading for training and for evaluation have in common.

    Args:
        split: What to read.
        slices: The process's slice of each batch.
        augmented: Whether images are cropped and mirrored at random.
        form: Type of the images, and whether records are numbered.
        num_threads: Threads that decode.

    Attributes:
        slices: As given.
        share: The process's part of the split.
        draws: Random numbers that an image needs.
    """

    def __init__(
        self,
        split: splits.Split,
        slices: order.Slices,
        augmented: bool,
        form: loading.Form,
        num_threads: int,
    ):
        self.slices = slices
        assert isinstance(split.records, tf_splits.TfRecords)
        self.share = split.records.share(slices.process_index, slices.process_count)
        self._records = split.records
        how = split.preprocessing, split.recipe
        size = None if split.fixed_size else split.image_shape[0]
        self.draws, self._augment = tf_augment.augmentation(
            *how, size=size, augmented=augmented
        )
        self._normalise = tf_augment.normaliser(*how, split.image_shape)
        self._split = split
        self._dtype = tf.as_dtype(np.dtype(form.dtype))
        self._with_index = form.with_index
        self._num_threads = num_threads

    def decoded(self, images: tf.data.Dataset) -> tf.data.Dataset:
        """Images for the model, from records and random numbers."""
        return images.map(self._load, self._num_threads, deterministic=True)

    def batched(self, images: tf.data.Dataset) -> tf.data.Dataset:
        """Batches of images, two of them read ahead."""
        options = tf.data.Options()
        options.deterministic = True
        options.threading.private_threadpool_size = self._num_threads
        batches = images.batch(self.slices.local_size, drop_remainder=True)
        return batches.prefetch(2).with_options(options)

    def explained(self, error: tf.errors.OpError, rest: tf.data.Dataset) -> Exception:
        """What to raise for an error that the next batch ended in.

        TensorFlow names neither a record nor its file, so those of the batch are read
        one by one.

        Args:
            error: TensorFlow's.
            rest: Numbers of the records from the next batch on, with random numbers.

        Returns:
            An error that names the record, if one is to blame.
        """
        if isinstance(error, tf.errors.InvalidArgumentError):
            for (record, _), draws in rest.take(self.slices.local_size):
                if fault := self._fault(int(record), draws):
                    return fault
        origin = self._split.origin
        return decoding.RecordError(
            f"{origin.split!r} of {origin.dataset} cannot be read: {error.message}"
        )

    def _fault(self, record: int, draws: tf.Tensor) -> decoding.RecordError | None:
        """What is wrong with a record or with one before it in the file."""
        describe, contents = self._split.origin.describe, b""
        for number, contents in tf_splits.read_up_to(self.share, record):
            if not contents:
                return decoding.RecordError(
                    f"{describe(number)} cannot be read: the file is damaged there, or "
                    "ends. It has to be copied or prepared once more"
                )
        try:
            self._load((record, contents), draws)
        except tf.errors.InvalidArgumentError:
            return decoding.RecordError(
                f"{describe(record)}: the image is neither a JPEG nor a PNG that can "
                "be decoded. The file has to be prepared once more; or prepare the "
                "data set as array_record: --reader array_record --bad-images blank "
                "goes on without such images"
            )
        return None

    def _load(
        self, numbered: tuple[tf.Tensor | int, tf.Tensor | bytes], draws: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        record, contents = numbered
        example = self._records.parsed(contents)
        image = self._augment(example["image"], draws)
        shape = self._split.image_shape
        if image.shape[:2] != shape[:2]:
            image = tf.image.resize(image, shape[:2])
        image = self._normalise(tf.cast(image, tf.float32))
        loaded = {
            "image": tf.cast(tf.ensure_shape(image, shape), self._dtype),
            "label": tf.cast(example["label"], tf.int32),
        }
        if self._with_index:
            loaded["index"] = tf.cast(record, tf.int32)
        return loaded


def _iterator(batches: Any) -> Iterator[loading.Batch]:
    return batches.as_numpy_iterator()


def _files(share: list[tf_splits.Part]) -> tf.data.Dataset:
    paths = tf.constant([part.path for part in share], tf.string)
    numbers = [np.array([part[i] for part in share], np.int64) for i in (1, 2, 3)]
    return tf.data.Dataset.from_tensor_slices((paths, *numbers))


def _interleaved(files: tf.data.Dataset, count: int, read: _Read) -> tf.data.Dataset:
    """The records of some files at a time, in turns."""
    cycle = max(1, min(_CYCLE, count))
    return files.interleave(
        read,
        cycle_length=cycle,
        block_length=_BLOCK,
        num_parallel_calls=cycle,
        deterministic=True,
    )


def _numbers(path: Any, skip: Any, take: Any, first: Any) -> tf.data.Dataset:
    """The same numbers, without reading; the order of the stream needs no more."""
    del path, skip
    no_contents = tf.data.Dataset.from_tensors("").repeat()
    return tf.data.Dataset.zip(tf.data.Dataset.range(first, first + take), no_contents)
