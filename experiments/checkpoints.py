"""Checkpoints of a run: the training state and the position in the data.

Restoring returns every array bit for bit, typed random keys included, and the number of
batches taken from the training data, so a resumed run continues as if it had not
stopped.

orbax writes a checkpoint into a temporary directory, in the background, and renames it
when it is complete. Each checkpoint holds the checksums of its files: one that was
damaged later is moved aside, and the one before it is restored. A checkpoint that
cannot be written (the disk is full) is reported and its remains are removed; training
goes on, and the older checkpoints stay.
"""

import json
import os
import pathlib
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Self

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from lbopt import checks

_SUMS = "checksums.json"
_OF_ORBAX = "_CHECKPOINT_METADATA"  # orbax writes it again after the checksums
_ASIDE = "damaged"


class Place(NamedTuple):
    """The position in the data and the layout of a checkpoint, read before its arrays.

    Attributes:
      batches_taken: training batches taken so far.
      devices: number of devices over which the state is sharded.
      placement: placement of its inverses, as of ``lbopt.kfac``.
    """

    batches_taken: int
    devices: int = 1
    placement: str = "comm"


class Restored(NamedTuple):
    """A restored checkpoint.

    Attributes:
      step: steps done.
      state: the training state.
      place: the position in the data, and the layout.
    """

    step: int
    state: Any
    place: Place


class Checkpoints:
    """The checkpoints in a directory; the newest few and the best are kept.

    A context manager: leaving it waits for the checkpoint that is being saved in the
    background. Of several processes all must make the same calls.

    Args:
      directory: the directory; created if missing.
      keep: how many of the newest checkpoints to keep.
      keep_best: whether to keep the checkpoint of the largest accuracy as well.
      tell: called with a message on a checkpoint that could not be written or is
        damaged.

    Attributes:
      tell: the same; may be replaced.

    Raises:
      ValueError: if ``keep`` is not positive.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int = 2,
        keep_best: bool = False,
        tell: Callable[[str], None] = print,
    ):
        checks.whole("keep", keep, "1 keeps the newest")
        self._directory = pathlib.Path(directory).absolute()
        self.tell = tell
        self._saving: int | None = None
        newest = checkpoint_managers.LatestN(keep)
        best = checkpoint_managers.BestN(
            get_metric_fn=_accuracy,
            n=int(keep_best),
            keep_checkpoints_without_metrics=False,
        )
        self._manager = ocp.CheckpointManager(
            self._directory,
            item_names=("state", "data"),
            options=ocp.CheckpointManagerOptions(
                create=True,
                cleanup_tmp_directories=True,
                best_fn=_accuracy,
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [newest, best]
                ),
                async_options=ocp.AsyncOptions(post_finalization_callback=self._seal),
            ),
        )

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Waits until the last checkpoint is on disk."""
        self.wait()
        self._manager.close()

    def save(
        self, step: int, state: Any, place: Place, *, accuracy: float | None = None
    ) -> None:
        """Saves a checkpoint in the background.

        Args:
          step: steps done so far.
          state: the training state, a pytree of arrays. It may be donated to the next
            step as soon as this returns.
          place: the position in the data, and the layout.
          accuracy: test accuracy of this state, if it was evaluated.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        self._saving = step
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    data=ocp.args.JsonSave(place._asdict()),
                ),
                metrics=None if accuracy is None else {"accuracy": accuracy},
            )
        except Exception as error:
            self._failed(error)

    def wait(self) -> bool:
        """Waits for the checkpoint that is being saved.

        If it is not, ``tell`` has been called.

        Returns:
          Whether it is on disk.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failed(error)
            return False
        return True

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints, ascending."""
        return sorted(self._manager.all_steps())

    def restore_latest(self, like: Callable[[Place], Any]) -> Restored | None:
        """Restores the newest whole checkpoint; damaged ones are moved aside.

        Args:
          like: returns the structure, shapes, types and shardings of the state, as
            arrays or their shapes, for the ``Place`` of the checkpoint.

        Returns:
          The checkpoint, or None if the directory never held one.

        Raises:
          ValueError: if the checkpoint holds a state of another structure or shape, or
            if all checkpoints are damaged.
        """
        self.wait()
        steps = self.steps()
        for step in reversed(steps):
            if problem := self._problem(step):
                self._put_aside(step, problem)
                continue
            data = ocp.args.Composite(data=ocp.args.JsonRestore())
            place = Place(**self._manager.restore(step, args=data)["data"])
            shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like(place))
            items = ocp.args.Composite(state=ocp.args.StandardRestore(shapes))
            state = self._manager.restore(step, args=items)["state"]
            return Restored(step, state, place)
        if steps or self._aside.exists():
            raise ValueError(
                f"directory={self._directory} must hold a checkpoint that is whole; "
                f"the damaged ones are in {self._aside}: choose another --directory to "
                "start from the beginning"
            )
        return None

    @property
    def _aside(self) -> pathlib.Path:
        return self._directory.with_name(_ASIDE)

    def _seal(self) -> None:
        """Adds the checksums to the checkpoint before orbax renames it."""
        if jax.process_index() == 0:
            (unfinished,) = self._unfinished()
            names = _files(unfinished)
            sums = {name: _checksum(unfinished / name) for name in names}
            (unfinished / _SUMS).write_text(json.dumps(sums), encoding="utf-8")

    def _unfinished(self) -> Iterator[pathlib.Path]:
        """Returns the temporary directories of the checkpoint, one at the most."""
        return self._directory.glob(f"{self._saving}.*tmp*")

    def _failed(self, error: Exception) -> None:
        """Reports a checkpoint that could not be written, and removes its remains."""
        if jax.process_index() == 0:
            for remains in self._unfinished():
                shutil.rmtree(remains, ignore_errors=True)
        self._manager.reload()
        older = self.steps()
        rest = f"the newest is that of step {older[-1]}" if older else "there is none"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        self.tell(
            f"the checkpoint of step {self._saving} could not be written ({reason}); "
            f"training goes on, and {rest}"
        )

    def _problem(self, step: int) -> str | None:
        """Returns the damage of a checkpoint, found by process 0, or None."""
        problem = None
        if jax.process_index() == 0:
            problem = _damage(self._directory / str(step))
        if jax.process_count() > 1:
            whole = multihost_utils.broadcast_one_to_all(problem is None)
            return None if whole else problem or "see process 0"
        return problem

    def _put_aside(self, step: int, problem: str) -> None:
        aside = self._aside / str(step)
        if jax.process_index() == 0:
            aside.parent.mkdir(exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            (self._directory / str(step)).rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"checkpoint {step} put aside")
        self._manager.reload()
        self.tell(
            f"the checkpoint of step {step} is damaged ({problem}); it is kept in "
            f"{aside}, and the one before it is restored"
        )


def _accuracy(metrics: Mapping[str, float]) -> float:
    return metrics["accuracy"]


def _files(directory: pathlib.Path) -> Iterator[str]:
    """Yields the names of the checkpoint's files that never change."""
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name not in (_SUMS, _OF_ORBAX):
            yield path.relative_to(directory).as_posix()


def _checksum(path: pathlib.Path) -> int:
    """Returns the CRC-32 of a file."""
    total = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            total = zlib.crc32(part, total)
    return total


def _damage(directory: pathlib.Path) -> str | None:
    """Returns the first damage of a checkpoint's files, or None."""
    try:
        sums = json.loads((directory / _SUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{_SUMS} is missing or cannot be read"
    for name, expected in sums.items():
        path = directory / name
        if not path.is_file():
            return f"{name} is missing"
        if _checksum(path) != expected:
            return f"{name} has another checksum than when it was written"
    return None
