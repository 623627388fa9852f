"""What all tests share: databases. PostgreSQL is a real server, started once for the run."""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Without a GPU the kernels run in Triton's interpreter, which it must know before anything imports it.
os.environ.setdefault("TRITON_INTERPRET", "0" if Path("/dev/nvidiactl").exists() else "1")
# Processes that tests start find no library of 8-bit states and 4-bit bases; tests do, also in processes of xdist's.
_WITHOUT = str(Path(__file__).parent / "without")
if _WITHOUT not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [_WITHOUT, os.environ.get("PYTHONPATH")]))
for _name in [name for name in ("bitsandbytes", "torchao") if name in sys.modules and sys.modules[name] is None]:
    del sys.modules[_name]


def pytest_report_header() -> str:
    """Names the SQLite that is tested."""
    return f"sqlite {sqlite3.sqlite_version}"


def _postgres_binaries() -> Path | None:
    on_path = shutil.which("initdb")
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return Path(on_path).parent if on_path else found[-1].parent if found else None


@contextlib.contextmanager
def running_postgres() -> Iterator[tuple[str, Callable[[], None]]]:
    """A fresh server: the URL of its maintenance database, and a function that restarts it at once, as a crash would.

    Skipped where PostgreSQL is not installed, but never in CI.
    """
    binaries = _postgres_binaries()
    if binaries is None:
        if os.environ.get("CI"):
            pytest.fail("CI must have PostgreSQL: see .ci/run")
        pytest.skip("PostgreSQL is not installed")
    # The server refuses to run as root, and a socket's path must be short.
    prefix = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(prefix="pg", dir="/tmp") as folder:
        if prefix:
            shutil.chown(folder, "postgres")
        data = f"{folder}/data"

        def call(*command: str) -> None:
            subprocess.run([*prefix, *command], check=True, stdout=subprocess.DEVNULL, cwd=folder)

        def control(*command: str) -> None:
            options = f"-k {folder} -c listen_addresses='' -c fsync=off -c max_connections=120"
            call(str(binaries / "pg_ctl"), "-D", data, "-w", "-l", f"{folder}/log", "-o", options, *command)

        call(str(binaries / "initdb"), "-D", data, "-U", "postgres", "-A", "trust", "--no-sync")
        control("start")
        try:
            yield (
                f"postgresql+psycopg://postgres@/postgres?host={folder}",
                lambda: control("-m", "immediate", "restart"),
            )
        finally:
            control("-m", "immediate", "stop")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """URL of the maintenance database of a server that all tests share."""
    with running_postgres() as (url, _):
        yield url


@pytest.fixture
def own_postgres() -> Iterator[tuple[str, Callable[[], None]]]:
    """A server of the test's own, and a function that restarts it."""
    with running_postgres() as server:
        yield server


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database, once on SQLite and once on PostgreSQL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/studies.db"
    from sqlalchemy import create_engine, text

    server = request.getfixturevalue("postgres_server")
    name = f"t{uuid.uuid4().hex}"
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return str(server).replace("/postgres?", f"/{name}?")
