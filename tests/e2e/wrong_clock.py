"""The command line on a machine whose wall clock jumps: `python wrong_clock.py ARGUMENTS...`.

Each reading is of another day, up to two days off, and every tenth of 1970. The monotonic clocks are right.
"""

from __future__ import annotations

import itertools
import sys
import time

from sweep.cli import main

DAY_NS = 86_400 * 10**9
right, readings = time.time_ns, itertools.count()


def wrong_ns() -> int:
    """A wall clock that nobody should decide by."""
    turn = next(readings)
    return turn * 10**9 if turn % 10 == 9 else right() + (turn % 5 - 2) * DAY_NS


time.time_ns = wrong_ns
time.time = lambda: wrong_ns() / 1e9
sys.argv = ["sweep", *sys.argv[1:]]
main()
