"""Checkpoints of a run: the training state and the place in the data, saved together.

Restoring gives every array bit for bit, typed random keys included, and the number of
batches taken from the training data, so a resumed run continues as if it had not
stopped.

orbax writes a checkpoint aside, in the background, and renames it when it is whole.
Into each go the checksums of its files, so that one that was damaged later is told from
a whole one: it is moved aside and the one before it is taken. A checkpoint that cannot
be written (the disk is full) is reported and its remains are removed; training goes on,
and the older ones stay.
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

_SUMS = "checksums.json"
_OF_ORBAX = "_CHECKPOINT_METADATA"  # which it writes once more after we have summed
_ASIDE = "damaged"


class Place(NamedTuple):
    """What a checkpoint tells about itself before its arrays are read.

    Attributes:
        batches_taken: Training batches taken so far.
        devices: Devices that the state was laid out for.
        placement: Where its inverses lie, in the words of `lbopt.kfac`.
    """

    batches_taken: int
    devices: int = 1
    placement: str = "comm"


class Restored(NamedTuple):
    """A checkpoint that was read.

    Attributes:
        step: Steps done.
        state: The training state.
        place: What else was saved.
    """

    step: int
    state: Any
    place: Place


class Checkpoints:
    """The checkpoints in one directory; the newest few and the best are kept.

    Use as a context manager or call `close`: saving goes on in the background. Of
    several processes all must make the same calls.

    Args:
        directory: The directory; made if missing.
        keep: How many of the newest checkpoints to keep.
        keep_best: Whether to keep that of the largest accuracy as well.
        tell: Where messages go: about a checkpoint that could not be written, or is
            skipped because it is damaged.

    Attributes:
        tell: The same; it may be changed.

    Raises:
        ValueError: If `keep` is not positive.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        keep: int = 2,
        keep_best: bool = False,
        tell: Callable[[str], None] = print,
    ):
        if keep < 1:
            raise ValueError(f"keep must be positive, got {keep}")
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
        """Closes the checkpoints."""
        self.close()

    def save(
        self, step: int, state: Any, place: Place, *, accuracy: float | None = None
    ) -> None:
        """Saves what is needed to continue after a step, in the background.

        Args:
            step: Steps done so far.
            state: The training state, a pytree of arrays. It may be donated to the next
                step as soon as this returns.
            place: What else to save.
            accuracy: Of the test images with this state, if they were evaluated.
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
        """Waits until what is being saved is on disk.

        Returns:
            Whether it is; if not, that has been told.
        """
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failed(error)
            return False
        return True

    def steps(self) -> list[int]:
        """The steps of the checkpoints there are, ascending."""
        return sorted(self._manager.all_steps())

    def restore_latest(self, like: Callable[[Place], Any]) -> Restored | None:
        """Restores the newest whole checkpoint; damaged ones are moved aside.

        Args:
            like: Gives the structure, shapes, types and shardings that the state shall
                have, as arrays or their shapes, by what the checkpoint tells.

        Returns:
            The checkpoint, or `None` if there has been none.

        Raises:
            ValueError: If the checkpoint holds a state of another structure or shape,
                or all checkpoints are damaged.
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
                f"{self._directory} has no checkpoint that is whole; the damaged ones "
                f"are in {self._aside}. To begin anew choose another --directory"
            )
        return None

    def close(self) -> None:
        """Waits until everything is on disk."""
        self.wait()
        self._manager.close()

    @property
    def _aside(self) -> pathlib.Path:
        return self._directory.with_name(_ASIDE)

    def _seal(self) -> None:
        """Adds the checksums to the checkpoint that is about to be renamed."""
        if jax.process_index() == 0:
            (unfinished,) = self._unfinished()
            names = _files(unfinished)
            sums = {name: _checksum(unfinished / name) for name in names}
            (unfinished / _SUMS).write_text(json.dumps(sums), encoding="utf-8")

    def _unfinished(self) -> Iterator[pathlib.Path]:
        """The directory that orbax writes the checkpoint to."""
        return self._directory.glob(f"{self._saving}.*tmp*")

    def _failed(self, error: Exception) -> None:
        """Reports a checkpoint that was not written, and removes its remains."""
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
        """What is wrong with a checkpoint, as process 0 sees it."""
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
            f"{aside}, and the one before it is taken"
        )


def _accuracy(metrics: Mapping[str, float]) -> float:
    return metrics["accuracy"]


def _files(directory: pathlib.Path) -> Iterator[str]:
    """The files of a checkpoint that never change, by their names in it."""
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name not in (_SUMS, _OF_ORBAX):
            yield path.relative_to(directory).as_posix()


def _checksum(path: pathlib.Path) -> int:
    """CRC-32 of a file."""
    total = 0
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            total = zlib.crc32(part, total)
    return total


def _damage(directory: pathlib.Path) -> str | None:
    """What is wrong with a checkpoint's files, if anything is."""
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
