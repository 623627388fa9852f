"""The worker's meter: where time goes when several trials share a stretch."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

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


def reported(spent_ns: dict[str, int], before: dict[str, int], at_ms: int) -> dict[str, int]:
    """The definition of a report: whole milliseconds by what is owed, then one each to who is owed most."""
    owed = {centre: ns - before.get(centre, 0) * 1_000_000 for centre, ns in spent_ns.items()}
    found, left = dict(before), at_ms - sum(before.values())
    for one_each in (False, True):
        for centre in sorted(owed, key=lambda c: (-owed[c], c)):
            part = min(left, 1 if one_each else max(owed[centre], 0) // 1_000_000)
            found[centre] = found.get(centre, 0) + part
            owed[centre] -= part * 1_000_000
            left -= part
    return {centre: ms for centre, ms in found.items() if ms}


TIMES = st.sampled_from([0, 1, 1000, 499_999, 500_000, 777_777, 1_000_000, 3_333_333, 20_000_001])
WEIGHTS = st.dictionaries(st.integers(0, 30).map("trial:{}".format), st.sampled_from([0, 1, 5, 30]), max_size=6)
STRETCHES = st.lists(st.tuples(TIMES, st.none() | st.just("checkpoint") | WEIGHTS, st.booleans()), max_size=120)


@settings(max_examples=80, deadline=None)
@given(STRETCHES)
def test_a_report_is_as_defined_though_few_centres_are_looked_at(stretches: list[tuple[int, object, bool]]) -> None:
    """Proves that each report is what sorting all centres by what they are owed gives, and sums to the time."""
    clock = [0]
    meter = Meter(lambda: clock[0])
    meter.ready()
    last: dict[str, int] = {}
    for ns, centre, reports in stretches:
        if isinstance(centre, dict):
            with meter.shared(dict(centre)):
                clock[0] += ns
        elif isinstance(centre, str):
            with meter.on(centre):
                clock[0] += ns
        else:
            clock[0] += ns
        if reports:
            at_ms, usage = meter.usage()
            assert usage == reported(meter._spent_ns, last, at_ms) and sum(usage.values()) == at_ms
            last = usage
