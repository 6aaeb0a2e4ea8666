"""A file that grows by whole records, also while its disk is full."""

import collections
import contextlib
import os
import pathlib
from collections.abc import Callable


class AppendOnlyFile:
    """Appends records; one that cannot be written is kept and tried again.

    A record is handed to the operating system at once, so that a process that is
    killed loses at most the one it was writing. Where the disk is full or fails, what
    was written of a record is cut off again, and it waits in memory, with those after
    it, until an append succeeds: training goes on, and the file holds whole records in
    their order.

    Args:
        path: The file; appended to if it is there.
        tell: Called with a sentence when writing fails, when it succeeds again, and
            when records are lost at the end.

    Raises:
        OSError: If the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike, tell: Callable[[str], None]):
        self._name = pathlib.Path(path).name
        self._tell = tell
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._end = os.fstat(self._file).st_size
        self._torn = False
        self._waiting: collections.deque[bytes] = collections.deque()
        self._failure: OSError | None = None

    def append(self, record: bytes) -> None:
        """Writes a record, or keeps it until it can be written.

        Args:
            record: The bytes of one record.
        """
        self._waiting.append(record)
        self._flush()

    def close(self) -> None:
        """Tries what waits for the last time, and closes the file."""
        self._flush()
        os.close(self._file)
        if self._failure is not None:
            self._tell(
                f"{self._name} could not be written ({self._failure.strerror}); "
                f"{_records(len(self._waiting))} lost"
            )

    def _flush(self) -> None:
        number = len(self._waiting)
        try:
            while self._waiting:
                self._write(self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            with contextlib.suppress(OSError):
                self._cut()
            first, self._failure = self._failure is None, error
            if first:  # those that follow have the same cause
                self._tell(
                    f"{self._name} could not be written ({error.strerror}); "
                    f"{_records(len(self._waiting))} kept in memory and tried again, "
                    "with those to come"
                )
            return
        if self._failure is not None:
            self._failure = None
            self._tell(f"{self._name} can be written again; {_records(number)} written")

    def _write(self, record: bytes) -> None:
        if self._torn:
            self._cut()
        self._torn, done = True, 0
        while done < len(record):
            done += os.pwrite(self._file, record[done:], self._end + done)
        self._torn = False
        self._end += done

    def _cut(self) -> None:
        """Removes what was written of a record that failed."""
        os.ftruncate(self._file, self._end)
        self._torn = False


def _records(number: int) -> str:
    return "1 record is" if number == 1 else f"{number:,} records are"
