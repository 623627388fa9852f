"""Append-only files of whole lines, durable when `append` returns, on a disk that may fill up."""

from __future__ import annotations

import os
from pathlib import Path


class Journal:
    """One append-only file. A failed append leaves the file as it was, so no line is ever torn.

    What could not be written is kept and goes first with the next append: the order of lines holds.
    """

    def __init__(self, path: Path) -> None:
        """Opens `path`, made if missing. Raises OSError."""
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._kept = b""

    def append(self, lines: bytes) -> None:
        """Writes and fsyncs whole lines. Raises OSError; then they are kept for the next call."""
        self._kept += lines
        size = os.fstat(self._descriptor).st_size
        left = memoryview(self._kept)
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
            os.fsync(self._descriptor)
        except OSError:
            os.ftruncate(self._descriptor, size)
            raise
        self._kept = b""

    def forget(self) -> None:
        """Gives up the lines that could not be written."""
        self._kept = b""

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)


class Ballast:
    """Space set aside on the disk, to be given back when a full disk would otherwise cost us the last records."""

    def __init__(self, path: Path, size: int) -> None:
        """Writes `size` bytes that no file system can shrink. Raises OSError."""
        self._path = path
        with path.open("wb") as file:
            file.write(os.urandom(size))
            file.flush()
            os.fsync(file.fileno())

    def free(self) -> None:
        """Gives the space back; a second call does nothing. Raises OSError."""
        self._path.unlink(missing_ok=True)
