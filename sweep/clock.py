"""Wall time, for people alone. Machine time is the launcher's to tell (sweep/launchers/base.py)."""

from __future__ import annotations

import time


def unix_ms() -> int:
    """Wall time in milliseconds, for people; no decision reads it."""
    return time.time_ns() // 1_000_000
