"""How many holds a second the ledger can settle, beside what the disk below it can do.

    python -m benchmarks.ledger [--postgres URL] [--folder /tmp] [--seconds 2] [--runs 5] [--json]

Run it in the root of a checkout. SQLite is measured as the product uses it (sweep/store.py: WAL, synchronous=FULL), in
a file below `--folder`; PostgreSQL at `--postgres`, in a database that may be written to, or else on a server of its
own below the same folder, with its defaults (fsync on). Without either only SQLite is measured. A folder in memory has
no fsync worth the name, so name one on a disk.

    round trip   hold in one transaction, settle in the next: two commits
    renewal      what a worker does when its slice ends: settle and hold in one transaction, one commit
    fsync        4 KiB written to the end of a file in the same folder, then fsync

The figures are medians over the runs, which take turns so that whatever else the machine does meets all of them alike.
`commits per fsync` is how close the ledger comes to one write of the disk for each commit.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from budgets import audit
from budgets.ledger import Ledger
from sweep.store import Store

CAP_MICROS = 10**15
HELD_MICROS = 1_000
CHARGES = {"trial:0": 600, "overhead:load": 100}
BLOCK = b"\0" * 4096


@dataclass(frozen=True)
class Figure:
    """One row of the table; rates are a second's."""

    what: str
    median: float
    low: float
    high: float
    commits_per_fsync: float | None


def round_trip(store: Store, study: str, number: int) -> None:
    """A hold and its settlement, each in a transaction of its own."""
    with store.write() as connection:
        Ledger(connection, study).hold(f"{study}:{number}", HELD_MICROS, fence=1, purpose="benchmark")
    with store.write() as connection:
        Ledger(connection, study).settle(f"{study}:{number}", CHARGES, fence=1)


def renewal(store: Store, study: str, number: int) -> None:
    """Settles the last slice and holds the next; the first has nothing to settle."""
    with store.write() as connection:
        ledger = Ledger(connection, study)
        if number:
            ledger.settle(f"{study}:{number - 1}", CHARGES, fence=1)
        ledger.hold(f"{study}:{number}", HELD_MICROS, fence=1, purpose="benchmark")


def rate(work: Callable[[int], object], seconds: float) -> float:
    """How often `work` can be done in a second."""
    began = time.perf_counter()
    for number in itertools.count():
        work(number)
        took = time.perf_counter() - began
        if took >= seconds:
            return (number + 1) / took
    raise AssertionError


def fsync_rate(folder: Path, seconds: float) -> float:
    """Appends and fsyncs."""
    path = folder / "fsync"
    with path.open("wb", buffering=0) as file:

        def append(_: int) -> None:
            file.write(BLOCK)
            os.fsync(file.fileno())

        found = rate(append, seconds)
    path.unlink()
    return found


def ledger_rate(store: Store, work: Callable[[Store, str, int], None], seconds: float) -> float:
    """Does `work` in a new study; its books must be whole afterwards."""
    study = uuid.uuid4().hex
    with store.write() as connection:
        Ledger(connection, study).open(CAP_MICROS)
    found = rate(lambda number: work(store, study, number), seconds)
    with store.read() as connection:
        violations = audit.violations(connection, study)
    if violations:
        raise SystemExit(f"the ledger is broken: {violations}")
    return found


@contextlib.contextmanager
def scratch_postgres(folder: Path) -> Iterator[str | None]:
    """URL of a server of our own with its defaults, None where PostgreSQL is not installed."""
    on_path = shutil.which("initdb")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not on_path and not found:
        yield None
        return
    binaries = Path(on_path).parent if on_path else found[-1].parent
    # The server refuses to run as root, and a socket's path must be short.
    prefix = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    data = folder / "postgresql"
    data.mkdir()
    with tempfile.TemporaryDirectory(prefix="pg", dir="/tmp") as socket:
        if prefix:
            folder.chmod(0o755)
            for owned in (data, socket):
                shutil.chown(owned, "postgres")

        def call(*command: str) -> None:
            subprocess.run([*prefix, *command], check=True, stdout=subprocess.DEVNULL, cwd=socket)

        call(str(binaries / "initdb"), "-D", str(data), "-U", "postgres", "-A", "trust")
        control = (str(binaries / "pg_ctl"), "-D", str(data), "-w", "-l", f"{socket}/log")
        call(*control, "-o", f"-k {socket} -c listen_addresses=''", "start")
        try:
            yield f"postgresql+psycopg://postgres@/postgres?host={socket}"
        finally:
            call(*control, "-m", "immediate", "stop")


def measure(folder: Path, urls: dict[str, str], seconds: float, runs: int) -> list[Figure]:
    """All figures; the fsync rate is the first."""
    stores = {name: Store(url, create=True) for name, url in urls.items()}
    commits = {"fsync": 1}
    rates: dict[str, list[float]] = {"fsync": []}
    for _ in range(runs):
        rates["fsync"].append(fsync_rate(folder, seconds))
        for name, store in stores.items():
            for work, per in ((round_trip, 2), (renewal, 1)):
                what = f"{name} {work.__name__.replace('_', ' ')}"
                commits[what] = per
                rates.setdefault(what, []).append(ledger_rate(store, work, seconds))
    for store in stores.values():
        store.dispose()
    medians = {what: statistics.median(found) for what, found in rates.items()}
    return [
        Figure(
            what=what,
            median=round(medians[what], 1),
            low=round(min(found), 1),
            high=round(max(found), 1),
            commits_per_fsync=None if what == "fsync" else round(medians[what] * commits[what] / medians["fsync"], 3),
        )
        for what, found in rates.items()
    ]


def show(figures: list[Figure]) -> None:
    """Prints the table."""
    print(f"{'a second':<26}{'median':>10}{'lowest':>10}{'highest':>10}{'commits per fsync':>20}")
    for figure in figures:
        ratio = "" if figure.commits_per_fsync is None else f"{figure.commits_per_fsync:.3f}"
        print(f"{figure.what:<26}{figure.median:>10.1f}{figure.low:>10.1f}{figure.high:>10.1f}{ratio:>20}")


def main() -> None:
    """Reads the arguments, measures, prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ledger", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--postgres", metavar="URL", help="a database to use instead of a server of our own")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()), help="where the files are written")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long one measurement takes")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ledger-bench", dir=options.folder)))
        urls = {"sqlite": f"sqlite:///{folder}/studies.db"}
        postgres = options.postgres or stack.enter_context(scratch_postgres(folder))
        if postgres:
            urls["postgresql"] = postgres
        else:
            print("PostgreSQL is not installed; only SQLite is measured", file=sys.stderr)
        figures = measure(folder, urls, options.seconds, options.runs)
    if options.json:
        print(json.dumps([asdict(figure) for figure in figures], indent=1))
    else:
        show(figures)


if __name__ == "__main__":
    main()
