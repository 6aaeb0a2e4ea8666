"""Checkpoints of a run: the training state and the place in the data, saved together.

Restoring gives every array bit for bit, typed random keys included, and the number of
batches taken from the training data, so a resumed run continues as if it had not
stopped.
"""

import os
import pathlib
from typing import Any, Self

import jax
import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints in one directory; the newest few are kept.

    Use as a context manager or call `close`: saving goes on in the background.

    Args:
        directory: The directory; made if missing.
        keep: How many checkpoints to keep.

    Raises:
        ValueError: If `keep` is not positive.
    """

    def __init__(self, directory: str | os.PathLike, *, keep: int = 2):
        if keep < 1:
            raise ValueError(f"keep must be positive, got {keep}")
        self._manager = ocp.CheckpointManager(
            pathlib.Path(directory).absolute(),
            item_names=("state", "data"),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True),
        )

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Closes the checkpoints."""
        self.close()

    def save(self, step: int, state: Any, batches_taken: int) -> None:
        """Saves what is needed to continue after a step.

        Args:
            step: Steps done so far.
            state: The training state, a pytree of arrays. It may be donated to the next
                step as soon as this returns.
            batches_taken: Training batches taken so far.
        """
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            data=ocp.args.JsonSave({"batches_taken": batches_taken}),
        )
        self._manager.save(step, args=items)

    def restore_latest(self, like: Any) -> tuple[int, Any, int] | None:
        """Restores the newest checkpoint.

        Args:
            like: A training state, or its shapes, with the structure, types and
                shardings that the restored one shall have.

        Returns:
            The step, the state and the number of training batches taken, or `None` if
            there is no checkpoint.

        Raises:
            ValueError: If the checkpoint holds a state of another structure or shape.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(like), data=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=items)
        return step, restored["state"], restored["data"]["batches_taken"]

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.close()
