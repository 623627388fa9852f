"""The database: engines, pragmas, migrations, and who may drive a study.

SQLite runs in WAL with synchronous=FULL (money survives a power cut) and every transaction begins IMMEDIATE: a
deferred one that reads and then writes fails at once with SQLITE_BUSY_SNAPSHOT, whatever the timeout (SQLAlchemy's
sqlite dialect documentation describes the two events). WAL needs shared memory, so a file on a network file system is
refused. PostgreSQL (14 or newer) runs READ COMMITTED, because the ledger's check stands in the UPDATE itself; waits and
idle transactions are bounded there. A lost connection during COMMIT leaves the outcome unknown, and says so: what was
written by id can be repeated safely.
"""

from __future__ import annotations

import contextlib
import fcntl
import sqlite3
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, select, text
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError, NoSuchModuleError, OperationalError
from sqlalchemy.schema import CreateColumn

from budgets import schema as ledger_tables
from sweep import tables
from sweep.errors import (
    DiskError,
    NotFoundError,
    OutcomeUnknownError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
    StudyBusyError,
)

DEFAULT_STORAGE = "sqlite:///studies.db"
BUSY_MS = 30_000  # how long a transaction waits for another's lock
IDLE_MS = 60_000  # how long PostgreSQL lets a transaction stand open while its client does nothing
ORCHESTRATOR_LOCK = "orchestrator.lock"  # in a study's folder: who holds it drives the study
NETWORK_FILE_SYSTEMS = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "9p",
    "afs",
    "ceph",
    "fuse.sshfs",
    "glusterfs",
    "lustre",
}
# SQLSTATE classes that pass by themselves: connection lost, serialization or deadlock, lock timeout, server going down.
PASSING = ("08", "40", "55P03", "57P", "25P03")
DISK_FULL = "53100"  # the SQLSTATE
FREE_SPACE = "free some space, then sweep resume; nothing was lost"


def _m001_first_tables(connection: Connection) -> None:
    ledger_tables.metadata.create_all(connection)
    tables.metadata.create_all(connection)


def _m002_tariffs_and_guards(connection: Connection) -> None:
    """Prices that change, billing quanta, forecasts in the order of their measurements, guards on holds."""
    _m001_first_tables(connection)
    _add_missing_columns(connection)
    connection.execute(
        text(
            "UPDATE sweep_evaluation SET ordinal = (SELECT count(*) FROM sweep_evaluation AS e WHERE"
            " e.study = sweep_evaluation.study AND (e.trial < sweep_evaluation.trial OR"
            " (e.trial = sweep_evaluation.trial AND e.rung <= sweep_evaluation.rung))) WHERE ordinal = 0"
        )
    )
    ledger_tables.guard(connection)


def _m003_packs(connection: Connection) -> None:
    """Trials that train at once: how many in each measured stretch, and the occupancy of each worker."""
    _add_missing_columns(connection)


def _m004_endgame(connection: Connection) -> None:
    """Confirmations, metrics, scores by example, peak memory."""
    tables.metadata.create_all(connection)
    _add_missing_columns(connection)


def _m005_writes(connection: Connection) -> None:
    """How long checkpoints take that are written beside training."""
    _add_missing_columns(connection)


def _m006_company(connection: Connection) -> None:
    """How large the batches were of those that trained at once."""
    _add_missing_columns(connection)


def _add_missing_columns(connection: Connection) -> None:
    inspected = inspect(connection)
    for table in [*ledger_tables.metadata.sorted_tables, *tables.metadata.sorted_tables]:
        known = {column["name"] for column in inspected.get_columns(table.name)}
        for column in table.columns:
            if column.name not in known:
                definition = CreateColumn(column).compile(dialect=connection.dialect)
                connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {definition}")


# A new database runs them all; each one leaves alone what is there already.
MIGRATIONS: list[Callable[[Connection], None]] = [
    _m001_first_tables,
    _m002_tariffs_and_guards,
    _m003_packs,
    _m004_endgame,
    _m005_writes,
    _m006_company,
]


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
        if self.is_sqlite:
            refuse_network_file_system(self.path)
        try:
            self.engine = create_engine(self.url)
        except (NoSuchModuleError, ModuleNotFoundError) as error:
            raise StoreError(
                f"no driver for {self.url.drivername}: {error}", "pip install 'capsweep[postgres]'"
            ) from error
        if self.is_sqlite:
            begin_immediate(self.engine)
        else:
            bound_waits(self.engine)
        try:
            with _explained(self.url):
                self._open(create)
        except BaseException:
            self.engine.dispose()
            raise
        self._file = self._identity()
        self.writes = 0  # transactions of ours that may have changed something

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
        """A transaction that commits at the end.

        Raises StoreUnavailableError when the database is busy or cannot be reached, OutcomeUnknownError when it was
        lost during COMMIT, StoreError when it is gone.
        """
        if self._identity() != self._file:
            # SQLite would go on writing to the deleted file, and its money with it.
            raise StoreError(
                f"{self.path} was deleted or replaced while it was in use", "put it back, then sweep resume"
            )
        with _explained(self.url), self.engine.connect() as connection:
            transaction = connection.begin()
            self.writes += 1
            try:
                yield connection
            except BaseException:
                transaction.rollback()
                raise
            try:
                transaction.commit()
            except DBAPIError as error:
                if not error.connection_invalidated:
                    raise
                raise OutcomeUnknownError(
                    f"{self.url.render_as_string()} was lost during COMMIT: the last change is there or it is not",
                    "run sweep resume; it repeats what is missing and nothing else",
                ) from error

    @contextlib.contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Waits until no other process is at `what`, on PostgreSQL; a SQLite file has its own lock for everything."""
        if self.is_sqlite:
            yield
            return
        with self.write() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(hashtext(:name))").bindparams(name=f"sweep:{what}"))
            yield

    def _identity(self) -> tuple[int, int] | None:
        """Which file the SQLite database is; None if there is none, or no file."""
        try:
            found = self.path.stat() if self.is_sqlite else None
        except FileNotFoundError:
            return None
        return (found.st_dev, found.st_ino) if found else None

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that only reads and sees one snapshot, so that an audit may run beside the sweep."""
        snapshot = {} if self.is_sqlite else {"isolation_level": "REPEATABLE READ"}
        with _explained(self.url), self.engine.connect().execution_options(read_only=True, **snapshot) as connection:
            yield connection

    def dispose(self) -> None:
        """Closes all connections."""
        self.engine.dispose()

    @contextlib.contextmanager
    def drive(self, study: str, folder: Path) -> Iterator[None]:
        """Holds the right to drive a study; ends with the process, also under kill -9. Raises StudyBusyError.

        On one machine a file lock says so; on PostgreSQL a session's advisory lock says it to all machines.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = (folder / ORCHESTRATOR_LOCK).open("a")
        except OSError as error:
            raise DiskError(
                f"the study's folder {folder} cannot be used: {error.strerror}",
                "resume it on the machine, and as the user, that launched it",
            ) from error
        with lock as file, contextlib.ExitStack() as stack:
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

    def _open(self, create: bool) -> None:
        """Brings the tables up to date. Raises NotFoundError for an empty database unless `create`, StoreError."""
        with self.engine.connect().execution_options(read_only=True) as connection:
            version = self._version(connection)
        if version == 0 and not create:
            raise NotFoundError(f"{self.url.render_as_string()} holds no studies of ours", "launch a study first")
        if version > len(MIGRATIONS):
            raise StoreError(
                f"{self.url.render_as_string()} has schema version {version}, this program knows {len(MIGRATIONS)}",
                "use the program version that wrote it, or a newer one",
            )
        if version < len(MIGRATIONS):
            self._migrate()

    def _migrate(self) -> None:
        with self.engine.begin() as connection:
            if not self.is_sqlite:  # there a transaction holds the write lock from its first statement on
                connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('sweep:migrate'))"))
            done = self._version(connection)
            for version in range(done + 1, len(MIGRATIONS) + 1):
                MIGRATIONS[version - 1](connection)
                connection.execute(tables.schema.insert().values(version=version))

    def _version(self, connection: Connection) -> int:
        if not inspect(connection).has_table(tables.schema.name):
            return 0
        versions = connection.execute(select(tables.schema.c.version)).scalars().all()
        return max(versions, default=0)


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


def bound_waits(engine: Engine) -> None:
    """Bounds on every PostgreSQL connection how long it waits for a lock and how long it may stand idle in one."""

    @event.listens_for(engine, "connect")
    def _connect(connection: Any, _: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET lock_timeout = {BUSY_MS}")
            cursor.execute(f"SET idle_in_transaction_session_timeout = {IDLE_MS}")
            cursor.execute("SET synchronous_commit = on")
        connection.commit()


def refuse_network_file_system(path: Path, mounts: Path = Path("/proc/self/mounts")) -> None:
    """Raises StoreError if `path` is on a file system that several machines share; without /proc nothing is known."""
    if not mounts.exists():
        return
    place = path.absolute().parent.resolve()
    best, kind = Path(), ""
    for line in mounts.read_text().splitlines():
        _, mounted, type_, *_ = line.split()
        point = Path(mounted.replace("\\040", " "))
        if place.is_relative_to(point) and len(point.parts) >= len(best.parts):
            best, kind = point, type_
    if kind in NETWORK_FILE_SYSTEMS:
        raise StoreError(
            f"{path} is on a network file system ({kind}), where SQLite can lose money",
            "keep it on a local disk, or use --storage postgresql+psycopg://...",
        )


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
        if is_full(error):
            raise StoreFullError(f"{url.render_as_string()}: {reason}", FREE_SPACE) from error
        if _passes(error):
            raise StoreUnavailableError(f"{url.render_as_string()}: {reason}", "try again; nothing was lost") from error
        raise StoreError(f"{url.render_as_string()}: {reason}", "nothing was lost") from error
    except DBAPIError as error:
        if error.connection_invalidated:
            message = f"{url.render_as_string()}: the connection was lost"
            raise StoreUnavailableError(message, "run sweep resume") from error
        if type(error) is DatabaseError and isinstance(error.orig, sqlite3.Error):
            raise StoreError(
                f"{url.render_as_string()}: {error.orig}", "put a copy of it back that is whole"
            ) from error
        raise


def is_full(error: OperationalError) -> bool:
    """Whether the database has no room left on its disk."""
    if isinstance(error.orig, sqlite3.Error):
        return error.orig.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL
    return getattr(error.orig, "sqlstate", None) == DISK_FULL


def _passes(error: OperationalError) -> bool:
    """Whether the same transaction may succeed a moment later."""
    if error.connection_invalidated:
        return True
    if isinstance(error.orig, sqlite3.Error):
        return error.orig.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
    state = getattr(error.orig, "sqlstate", None)
    return state is None or state.startswith(PASSING)
