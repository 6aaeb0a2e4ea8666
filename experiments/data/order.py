"""The order of images in the stream, and each process's slice of it."""

from typing import NamedTuple

import grain
import numpy as np

_EPOCHS = 1 << 32  # of the endless stream


def shuffled(records: int, seed: int) -> grain.MapDataset[int]:
    """Returns the record at each position; each epoch is a random order of its own.

    Args:
      records: number of records.
      seed: seed of the orders, in ``[0, 2**32)``.

    Returns:
      Numbers in ``[0, records)``, by random access without a table.
    """
    # `repeat()` without a number has the largest index as its length, which could not
    # be rounded up to whole batches.
    return grain.MapDataset.range(records).seed(seed).shuffle().repeat(_EPOCHS)


class Slices(NamedTuple):
    """The slice of every global batch that one process reads.

    Attributes:
      batch_size: images in a global batch.
      process_index: index of the process.
      process_count: number of processes that share a batch.
    """

    batch_size: int
    process_index: int = 0
    process_count: int = 1

    def check(self) -> None:
        """Raises ValueError for no such process, or a batch that cannot be divided."""
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(
                f"process_index={self.process_index} must lie in "
                f"[0, {self.process_count}); count from 0"
            )
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise ValueError(
                f"batch_size={self.batch_size} must be a positive multiple of the "
                f"number of processes; {self.process_count} would do"
            )

    @property
    def local_size(self) -> int:
        """Images of a batch that this process reads."""
        return self.batch_size // self.process_count

    def positions(self, group: int, size: int) -> np.ndarray:
        """Returns the positions in the stream of a group of images.

        Args:
          group: number of the group among those of this process.
          size: images in a group; divides ``local_size``.

        Returns:
          int64 ``[size]``.
        """
        batch, within = divmod(group * size, self.local_size)
        first = batch * self.batch_size + self.process_index * self.local_size + within
        return np.arange(first, first + size)
