"""Disks, files and locks that fail: an error of its own, nothing written, and a repetition that heals it."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import ledger_faults
import pytest
from ledger_processes import opened
from sqlalchemy import make_url

import sweep.store
from budgets import audit
from budgets.ledger import Ledger
from sweep.errors import StoreError, StoreUnavailableError
from sweep.store import Store, refuse_network_file_system

CAP = 1_000_000
# Takes the lock that every verb needs, says so, and keeps it until its stdin ends or it is killed.
SQLITE_HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("BEGIN IMMEDIATE")
"""
POSTGRES_HOLDER = """
import psycopg, sys
connection = psycopg.connect(sys.argv[1])
connection.execute("UPDATE sweep_account SET seq = seq")
"""
WAIT = "print('locked', flush=True); sys.stdin.read()"


def hold(store: Store, name: str) -> None:
    """One write."""
    with store.write() as connection:
        Ledger(connection, "s").hold(name, 1, fence=1, purpose="slice")


def held(store: Store) -> set[str]:
    """The open holds of books that are whole."""
    with store.read() as connection:
        assert audit.violations(connection, "s") == []
        return set(Ledger(connection, "s").open_holds())


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    """A SQLite file with one funded study."""
    made = opened(f"sqlite:///{tmp_path}/studies.db", "s", CAP)
    yield made
    made.dispose()


@pytest.fixture
def lock_holder(storage: str) -> Callable[[], subprocess.Popen[str]]:
    """Starts a process that holds the write lock."""

    def start() -> subprocess.Popen[str]:
        url = make_url(storage)
        is_sqlite = storage.startswith("sqlite")
        code = (SQLITE_HOLDER if is_sqlite else POSTGRES_HOLDER) + WAIT
        target = url.database if is_sqlite else url.set(drivername="postgresql").render_as_string(hide_password=False)
        command = [sys.executable, "-c", code, str(target)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None and process.stdout.readline() == "locked\n"
        return process

    return start


@pytest.mark.parametrize("ends_by", ["itself", "kill -9"])
def test_a_lock_that_another_process_keeps(
    storage: str,
    lock_holder: Callable[[], subprocess.Popen[str]],
    ends_by: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Proves that a wait for a lock is bounded and writes nothing, and that a dead process keeps no lock."""
    monkeypatch.setattr(sweep.store, "BUSY_MS", 300)
    store = opened(storage, "s", CAP)
    with lock_holder() as process:
        began = time.monotonic()
        with pytest.raises(StoreUnavailableError) as refused:
            hold(store, "h")
        assert 0.25 < time.monotonic() - began < 10 and refused.value.exit_code == 6
        assert held(store) == set(), "readers do not wait"
        if ends_by == "kill -9":
            process.kill()
        else:
            process.communicate("")
    hold(store, "h")
    assert held(store) == {"h"}
    store.dispose()


def test_a_full_disk(store: Store) -> None:
    """Proves that SQLITE_FULL loses the transaction that met it and nothing before; with space the same id succeeds."""
    with store.write() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 2}")
    names: list[str] = []
    with pytest.raises(StoreError, match="full") as refused:
        for number in range(10_000):
            hold(store, f"h{number}")
            names.append(f"h{number}")
    assert refused.value.exit_code == 8 and "free some space" in refused.value.hint
    assert not isinstance(refused.value, StoreUnavailableError), "waiting does not make space"
    assert names and held(store) == set(names)
    with store.write() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"
    hold(store, f"h{len(names)}")
    assert held(store) == {*names, f"h{len(names)}"}


def test_a_write_that_the_system_refuses(store: Store, pool: ProcessPoolExecutor) -> None:
    """Proves that SQLITE_IOERR in mid-transaction rolls back cleanly and that the same id succeeds afterwards."""
    store.dispose()
    written, error = pool.submit(ledger_faults.write_until_refused, str(store.url), "s").result()
    assert error.startswith("StoreError: ") and "disk I/O error" in error
    assert written > 0 and held(store) == {f"h{number}" for number in range(written)}
    with store.read() as connection:
        assert connection.exec_driver_sql("PRAGMA integrity_check").scalar_one() == "ok"
    hold(store, f"h{written}")
    assert len(held(store)) == written + 1


@pytest.mark.parametrize("folder_mode", [0o777, 0o555])
def test_a_file_that_may_only_be_read(store: Store, pool: ProcessPoolExecutor, folder_mode: int) -> None:
    """Proves that a database without write permission is refused with an error of ours, in a writable folder or not."""
    hold(store, "h")
    store.dispose()
    with ledger_faults.public_folder() as folder:
        copy = shutil.copy2(store.path, folder)
        Path(copy).chmod(0o444)
        folder.chmod(folder_mode)
        error = pool.submit(ledger_faults.hold_as_nobody, f"sqlite:///{copy}", "s").result()
        assert error.startswith("StoreError 6: "), error
        assert "readonly" in error or "unable to open" in error
        folder.chmod(0o755)
        Path(copy).chmod(0o644)
        again = Store(f"sqlite:///{copy}")
        hold(again, "i")
        assert held(again) == {"h", "i"}
        again.dispose()


def test_a_file_that_was_deleted_while_it_was_open(store: Store, tmp_path: Path) -> None:
    """Proves that nothing is written to a file that nobody would find again; put back, it goes on."""
    hold(store, "h")
    moved = store.path.rename(tmp_path / "moved.db")
    with pytest.raises(StoreError, match="deleted or replaced") as refused:
        hold(store, "i")
    assert refused.value.exit_code == 6 and not isinstance(refused.value, StoreUnavailableError)
    assert not store.path.exists(), "no empty database takes its place"
    moved.rename(store.path)
    hold(store, "i")
    assert held(store) == {"h", "i"}


def test_a_file_that_was_replaced_while_it_was_open(store: Store, tmp_path: Path) -> None:
    """Proves that a copy put in the file's place is noticed before anything is written to the old one."""
    copy = shutil.copy2(store.path, tmp_path / "copy.db")
    Path(copy).replace(store.path)
    with pytest.raises(StoreError, match="deleted or replaced"):
        hold(store, "h")


@pytest.mark.parametrize("damage", ["no database", "overwritten"])
def test_a_file_that_is_damaged(store: Store, damage: str) -> None:
    """Proves that bytes that SQLite cannot read are an error of ours too, at the open or at the first write."""
    hold(store, "h")
    store.dispose()
    with store.path.open("r+b") as file:
        file.seek(0 if damage == "no database" else 4096)
        file.write(b"\xff" * 100_000)
    with pytest.raises(StoreError) as refused:
        again = Store(str(store.url))
        try:
            hold(again, "i")
        finally:
            again.dispose()
    assert refused.value.exit_code == 6 and not isinstance(refused.value, StoreUnavailableError)


def test_network_file_systems_are_refused(tmp_path: Path) -> None:
    """Proves that the innermost mount decides: NFS is refused, a local disk mounted below it is not."""
    mounts = tmp_path / "mounts"
    shared = tmp_path / "shared disk"
    local = shared / "scratch"
    local.mkdir(parents=True)
    escaped = str(shared).replace(" ", "\\040")
    lines = ["/dev/sda1 / ext4 rw 0 0", f"server:/export {escaped} nfs4 rw,vers=4.2 0 0"]
    lines += [f"/dev/sdb1 {escaped}/scratch ext4 rw 0 0"]
    mounts.write_text("\n".join(lines) + "\n")
    with pytest.raises(StoreError, match="nfs4") as refused:
        refuse_network_file_system(shared / "studies.db", mounts)
    assert refused.value.exit_code == 6 and "local disk" in refused.value.hint
    refuse_network_file_system(local / "studies.db", mounts)
    refuse_network_file_system(tmp_path / "studies.db", mounts)
    refuse_network_file_system(shared / "studies.db", tmp_path / "no such file")


def test_a_log_that_a_killed_process_left_is_recovered(store: Store, pool: ProcessPoolExecutor, tmp_path: Path) -> None:
    """Proves that what was committed before a kill -9 is there afterwards, though it stood in the -wal file alone."""
    store.dispose()
    pool.submit(ledger_faults.commit_and_die, str(store.url), "s", "h").result()
    log = Path(f"{store.path}-wal")
    assert log.stat().st_size > 0
    alone = shutil.copy2(store.path, tmp_path / "alone.db")
    with sqlite3.connect(alone) as connection:
        assert connection.execute("SELECT count(*) FROM sweep_hold").fetchone() == (0,)
    connection.close()
    again = Store(str(store.url))
    assert held(again) == {"h"}
    hold(again, "h")
    assert held(again) == {"h"}
    again.dispose()
