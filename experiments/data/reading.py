"""Reads groups of images ahead, in threads or processes, and joins them to batches."""

import math
import multiprocessing
import os
import threading
from collections.abc import Sequence

import cv2
import grain
import numpy as np
from absl import flags

from experiments.data import loading, order

_GROUP = 16  # images that a thread takes at a time, since each turn has a fixed cost


def batches(
    load: loading.Load,
    slices: order.Slices,
    span: range,
    *,
    num_threads: int,
    num_workers: int,
) -> grain.IterDataset:
    """Returns this process's slices of global batches, in order, read ahead.

    Args:
      load: from positions in the stream to a batch.
      slices: the slice of each batch.
      span: numbers of the batches.
      num_threads: threads that load, over all workers; 0 if images are gathered from
        memory, a batch at a time.
      num_workers: worker processes that load; 0 for threads of this process.
    """
    size = math.gcd(slices.local_size, _GROUP) if num_threads else slices.local_size
    groups = slices.local_size // size
    numbers = grain.MapDataset.range(span.start * groups, span.stop * groups)
    loaded = numbers.map(lambda number: load(slices.positions(number, size)))
    if not num_threads:
        ahead = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
        return loaded.to_iter_dataset(ahead)
    if not num_workers:
        # One batch ahead, or, if that is small, work for every thread.
        buffer = max(groups, num_threads)
        ahead = grain.ReadOptions(num_threads, prefetch_buffer_size=buffer)
        return loaded.to_iter_dataset(ahead).batch(groups, batch_fn=_concatenated)
    _parse_flags()
    threads = max(1, num_threads // num_workers)
    ahead = grain.ReadOptions(threads, prefetch_buffer_size=2 * threads)
    options = grain.MultiprocessingOptions(
        num_workers, per_worker_buffer_size=max(1, groups // num_workers)
    )
    read = loaded.to_iter_dataset(ahead).mp_prefetch(options, _start_worker)
    return read.batch(groups, batch_fn=_concatenated)


def _concatenated(parts: Sequence[loading.Batch]) -> loading.Batch:
    # A copy even of a single part: a worker's lies in memory that it reuses.
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def _parse_flags() -> None:
    """Marks absl's flags as parsed, which grain reads, if absl has not parsed them."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def _start_worker(index: int, count: int) -> None:
    """Makes a worker end with its parent, even if that is killed."""
    del index, count
    cv2.setNumThreads(1)  # else one thread per core in each worker
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
