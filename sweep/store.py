"""The database: engines, pragmas, migrations, and who may drive a study.

SQLite runs in WAL with synchronous=FULL (money survives a power cut) and every transaction begins IMMEDIATE: a
deferred one that reads and then writes fails at once with SQLITE_BUSY_SNAPSHOT, whatever the timeout (SQLAlchemy's
sqlite dialect documentation describes the two events). PostgreSQL runs as it is, READ COMMITTED, because the ledger's
check stands in the UPDATE itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, select, text
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, OperationalError

from budgets import schema as ledger_tables
from sweep import tables
from sweep.errors import NotFoundError, StoreError, StudyBusyError

DEFAULT_STORAGE = "sqlite:///studies.db"
BUSY_MS = 30_000


def _m001_first_tables(connection: Connection) -> None:
    ledger_tables.metadata.create_all(connection)
    tables.metadata.create_all(connection)


MIGRATIONS: list[Callable[[Connection], None]] = [_m001_first_tables]


class Store:
    """One database. `write` and `read` give transactions; readers never wait for the writer."""

    def __init__(self, url: str, *, create: bool = False) -> None:
        """Raises NotFoundError if a SQLite file does not exist and `create` is off, StoreError if it is unusable."""
        try:
            self.url: URL = make_url(url)
        except ArgumentError as error:
            raise StoreError(f"{url!r} is not a database URL", "write it as sqlite:///studies.db") from error
        if self.is_sqlite and not create and not self.path.exists():
            raise NotFoundError(f"there is no database {self.path}", "name it with --storage, or launch a study first")
        try:
            self.engine = create_engine(self.url)
        except (NoSuchModuleError, ModuleNotFoundError) as error:
            raise StoreError(
                f"no driver for {self.url.drivername}: {error}", "pip install 'capsweep[postgres]'"
            ) from error
        if self.is_sqlite:
            begin_immediate(self.engine)
        with _explained(self.url):
            if create:
                self._migrate()
            self._check_version()

    @property
    def is_sqlite(self) -> bool:
        """Whether the database is one file."""
        return self.url.get_backend_name() == "sqlite"

    @property
    def path(self) -> Path:
        """The SQLite file."""
        return Path(self.url.database or "")

    @property
    def optuna_url(self) -> str:
        """The URL for Optuna, which runs str.format on it: braces are doubled."""
        return self.url.render_as_string(hide_password=False).replace("{", "{{").replace("}", "}}")

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that commits at the end. Raises StoreError when the database is busy or gone."""
        with _explained(self.url), self.engine.begin() as connection:
            yield connection

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads; on SQLite it is deferred and sees one snapshot."""
        with _explained(self.url), self.engine.connect().execution_options(read_only=True) as connection:
            yield connection

    def dispose(self) -> None:
        """Closes all connections."""
        self.engine.dispose()

    @contextlib.contextmanager
    def drive(self, study: str, folder: Path) -> Iterator[None]:
        """Holds the right to drive a study; ends with the process, also under kill -9. Raises StudyBusyError.

        On one machine a file lock says so; on PostgreSQL a session's advisory lock says it to all machines.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "orchestrator.lock").open("a") as file, contextlib.ExitStack() as stack:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise _busy(study) from error
            if not self.is_sqlite:
                connection = stack.enter_context(self.engine.connect())
                query = text("SELECT pg_try_advisory_lock(hashtext(:name))").bindparams(name=f"sweep:{study}")
                if not connection.execute(query).scalar_one():
                    raise _busy(study)
                connection.commit()
            yield

    def _migrate(self) -> None:
        with self.engine.begin() as connection:
            done = self._version(connection)
            for version in range(done + 1, len(MIGRATIONS) + 1):
                MIGRATIONS[version - 1](connection)
                connection.execute(tables.schema.insert().values(version=version))

    def _version(self, connection: Connection) -> int:
        if not inspect(connection).has_table(tables.schema.name):
            return 0
        versions = connection.execute(select(tables.schema.c.version)).scalars().all()
        return max(versions, default=0)

    def _check_version(self) -> None:
        with self.engine.begin() as connection:
            version = self._version(connection)
        if version == 0:
            raise NotFoundError(f"{self.url.render_as_string()} holds no studies of ours", "launch a study first")
        if version != len(MIGRATIONS):
            raise StoreError(
                f"{self.url.render_as_string()} has schema version {version}, this program knows {len(MIGRATIONS)}",
                "use the program version that wrote it, or a newer one",
            )


def begin_immediate(engine: Engine) -> None:
    """Makes every transaction on a SQLite engine durable and IMMEDIATE; those marked read_only are deferred."""

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        for pragma in (
            f"busy_timeout={BUSY_MS}",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            "recursive_triggers=ON",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        read_only = connection.get_execution_options().get("read_only", False)
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def _busy(study: str) -> StudyBusyError:
    return StudyBusyError(
        f"another orchestrator drives study {study}", f"watch it with `sweep status {study}`, or end it first"
    )


@contextlib.contextmanager
def _explained(url: URL) -> typing.Iterator[None]:
    try:
        yield
    except OperationalError as error:
        reason = str(error.orig).strip().splitlines()[0]
        hint = "the disk is full" if "full" in reason else "try again; nothing was lost"
        raise StoreError(f"{url.render_as_string()}: {reason}", hint) from error
    except DBAPIError as error:
        if error.connection_invalidated:
            raise StoreError(f"{url.render_as_string()}: the connection was lost", "run sweep resume") from error
        raise
