"""The worker's meter: where time goes when several trials share a stretch."""

from __future__ import annotations

import itertools

from trainers.meter import Meter


def test_a_shared_stretch_leaves_nothing_in_no_ones_name() -> None:
    """Every look at the clock takes time, also while a stretch is divided: all of it has a trial's name, or idle's."""
    clock = itertools.count(0, 400_000)
    meter = Meter(lambda: next(clock))
    meter.ready()
    for _ in range(100):
        with meter.shared({"trial:1": 30, "trial:2": 10}):
            meter.now_ns()
        at_ms, usage = meter.usage()
        assert set(usage) <= {"load", "idle", "trial:1", "trial:2"}
        assert sum(usage.values()) == at_ms
    assert usage["trial:1"] > 2 * usage["trial:2"] > 0
