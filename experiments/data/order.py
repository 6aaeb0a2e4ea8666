"""Which image stands where: the order of the stream, and each process's slice of it."""

from typing import NamedTuple

import grain
import numpy as np

_EPOCHS = 1 << 32  # of the endless stream


def shuffled(records: int, seed: int) -> grain.MapDataset[int]:
    """Numbers of records by position: each epoch is a random order of its own.

    Args:
        records: How many there are.
        seed: In `[0, 2**32)`.

    Returns:
        Numbers in `[0, records)`, by random access without a table.
    """
    # Not `repeat()`, whose length, the largest index there is, could not be rounded
    # up to whole batches.
    return grain.MapDataset.range(records).seed(seed).shuffle().repeat(_EPOCHS)


class Slices(NamedTuple):
    """The slice of every global batch that one process reads.

    Attributes:
        batch_size: Images in a global batch.
        process_index: Which of the processes this is.
        process_count: How many processes share a batch.
    """

    batch_size: int
    process_index: int = 0
    process_count: int = 1

    def check(self) -> None:
        """Refuses what cannot be.

        Raises:
            ValueError: If there is no such process, or a batch cannot be divided.
        """
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(
                f"process_index must be in [0, {self.process_count}), got "
                f"{self.process_index}"
            )
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise ValueError(
                f"batch_size must be a positive multiple of the {self.process_count} "
                f"process(es), got {self.batch_size}"
            )

    @property
    def local_size(self) -> int:
        """Images of a batch that this process reads."""
        return self.batch_size // self.process_count

    def positions(self, group: int, size: int) -> np.ndarray:
        """Positions, in the stream of all processes, of a group of images.

        Args:
            group: Number of the group among those of this process.
            size: Images in a group; divides `local_size`.

        Returns:
            int64 `[size]`.
        """
        batch, within = divmod(group * size, self.local_size)
        first = batch * self.batch_size + self.process_index * self.local_size + within
        return np.arange(first, first + size)
