"""Scalars for TensorBoard.

The event file is of tensorboardX's protocol buffers, but written here: its own writer
hands events to a thread through a queue of ten, and when that thread dies of a full
disk, the program waits for the queue forever (seen with tensorboardX 2.6.5).
"""

import os
import pathlib
import socket
import struct
import time
from collections.abc import Callable, Mapping
from typing import Any

from tensorboardX import record_writer
from tensorboardX.proto import event_pb2, summary_pb2

from experiments import append_only

# Their classes are made at import, where no type checker sees them.
_EVENTS: Any = event_pb2
_SUMMARIES: Any = summary_pb2


class EventFile:
    """An event file of TensorBoard, of scalars alone.

    Args:
        directory: The directory of the run's event files; made if missing.
        first_step: Scalars of this step and of later ones, in other files of the
            directory, are not shown: the run was taken up before them.
        tell: Told when the file cannot be written, as by `AppendOnlyFile`.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        first_step: int,
        tell: Callable[[str], None],
    ):
        directory = pathlib.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        name = f"{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        path = directory / f"events.out.tfevents.{name}"
        self._file = append_only.AppendOnlyFile(path, tell)
        self._append(file_version="brain.Event:2")
        start = _EVENTS.SessionLog(status=_EVENTS.SessionLog.START)
        self._append(step=first_step, session_log=start)

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Appends the scalars of one step.

        Args:
            step: The step.
            scalars: The scalars by tag.
        """
        values = [
            _SUMMARIES.Summary.Value(tag=tag, simple_value=value)
            for tag, value in scalars.items()
        ]
        self._append(step=step, summary=_SUMMARIES.Summary(value=values))

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def _append(self, **fields: object) -> None:
        event = _EVENTS.Event(wall_time=time.time(), **fields)
        data = event.SerializeToString()
        # Framed as a TFRecord: length, its checksum, data, their checksum.
        length = struct.pack("<Q", len(data))
        checksums = (record_writer.masked_crc32c(part) for part in (length, data))
        of_length, of_data = (struct.pack("<I", checksum) for checksum in checksums)
        self._file.append(length + of_length + data + of_data)
