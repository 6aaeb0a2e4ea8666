"""Puts batches on a mesh of devices, a few ahead of the step.

Each process holds its slice of a global batch; placed, the slices are one array whose
first axis lies along the mesh axis ``data``.
"""

import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

_AHEAD = 2  # batches on the devices that nobody has asked for yet


class Batches(Protocol):
    """A stream of batches whose state is the number of batches taken."""

    def __next__(self) -> Mapping[str, np.ndarray]: ...

    def get_state(self) -> int:
        """Returns the number of batches taken so far."""
        ...

    def set_state(self, taken: int) -> None:
        """Continues after ``taken`` batches."""
        ...

    def close(self) -> None:
        """Ends threads and processes."""
        ...


def place(
    batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh | None
) -> dict[str, jax.Array]:
    """Puts a batch on the devices, its first axis divided along the mesh axis ``data``.

    Args:
      batch: this process's slice of each array.
      mesh: devices of all processes, with an axis ``data``; None for the default device
        of this process.

    Returns:
      The arrays of the global batch.

    Raises:
      ValueError: if the devices of this process cannot share the slice evenly.
    """
    if mesh is None:
        return jax.device_put(dict(batch))
    devices = mesh.local_mesh.shape["data"]
    sharding = jax.sharding.NamedSharding(mesh, jax.P("data"))
    for key, array in batch.items():
        if len(array) % devices:
            raise ValueError(
                f"{key}: {len(array)} items of a batch cannot be divided among the "
                f"{devices} devices of this process; choose a batch size that is a "
                f"multiple of {mesh.shape['data']}"
            )
    return {
        key: jax.make_array_from_process_local_data(sharding, array)
        for key, array in batch.items()
    }


class _Item(NamedTuple):
    """A batch and the state after it, or an error, from the thread."""

    batch: dict[str, jax.Array]
    state: int
    error: BaseException | None = None


class DeviceFeed(Iterator[dict[str, jax.Array]]):
    """Batches on devices, read and placed by a thread while the step before runs.

    The state counts the batches *taken* from the feed: those that were only read ahead
    are read again after a resume.

    Args:
      batches: the stream, from which only this feed takes.
      mesh: as in ``place``.
    """

    def __init__(self, batches: Batches, mesh: jax.sharding.Mesh | None):
        self._batches = batches
        self._mesh = mesh
        self._state = batches.get_state()
        self._thread: threading.Thread | None = None

    def __next__(self) -> dict[str, jax.Array]:
        """Returns the next batch, or raises the reader's error in its place."""
        if self._thread is None:
            self._start()
        item = self._items.get()
        if item.error is not None:
            # The thread has ended; the next call reads the batch again.
            self.set_state(self._state)
            raise item.error
        self._state = item.state
        return item.batch

    def get_state(self) -> int:
        """Returns the number of batches taken so far."""
        return self._state

    def set_state(self, taken: int) -> None:
        """Continues after ``taken`` batches; those read ahead are dropped."""
        self._stop()
        self._batches.set_state(taken)
        self._state = taken

    def close(self) -> None:
        """Ends all threads and worker processes; the state stays."""
        self.set_state(self._state)
        self._batches.close()

    def _start(self) -> None:
        self._items: queue.Queue[_Item] = queue.Queue(_AHEAD)
        self._stopped = threading.Event()
        self._thread = threading.Thread(
            target=_feed,
            args=(self._batches, self._mesh, self._items, self._stopped),
            name="device feed",
            daemon=True,
        )
        self._thread.start()

    def _stop(self) -> None:
        if self._thread is None:
            return
        self._stopped.set()
        while self._thread.is_alive():
            _drain(self._items)  # else the thread would wait for ever to put its batch
            self._thread.join(0.01)
        _drain(self._items)
        self._thread = None


def _feed(
    batches: Batches,
    mesh: jax.sharding.Mesh | None,
    items: queue.Queue[_Item],
    stopped: threading.Event,
) -> None:
    while not stopped.is_set():
        try:
            placed = place(next(batches), mesh)
            items.put(_Item(placed, batches.get_state()))
        except BaseException as error:  # raised again in the consumer's thread
            items.put(_Item({}, -1, error))
            return


def _drain(items: queue.Queue[Any]) -> None:
    while not items.empty():
        items.get_nowait()
