"""The worker's commands."""

from __future__ import annotations

import os
import select
from dataclasses import dataclass, field

EXIT_ORPHAN = 9
_READ_BYTES = 1 << 16


@dataclass
class Inbox:
    """Commands on stdin, read without blocking."""

    descriptor: int
    buffer: bytearray = field(default_factory=bytearray)

    def waiting(self, timeout_s: float = 0.0) -> bool:
        """Says whether anything is there to be read, or comes within `timeout_s` seconds."""
        return bool(select.select([self.descriptor], [], [], timeout_s)[0])

    def take(self) -> list[str]:
        """Returns the complete lines that are there. At the end of the file the watchdog is gone: this process ends."""
        while self.waiting():
            data = os.read(self.descriptor, _READ_BYTES)
            if not data:
                os._exit(EXIT_ORPHAN)  # nothing more can be paid for, so nothing is worth a tidy end
            self.buffer += data
        *lines, rest = bytes(self.buffer).split(b"\n")
        self.buffer[:] = rest
        return [line.decode(errors="replace") for line in lines]
