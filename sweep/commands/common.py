"""What the verbs share: options, the store, JSON output."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import click
from sqlalchemy import Connection

from sweep.store import DEFAULT_STORAGE, Store

F = TypeVar("F", bound=Callable[..., Any])


def storage_option(function: F) -> F:
    """Adds --storage."""
    return click.option(
        "--storage",
        metavar="URL",
        default=DEFAULT_STORAGE,
        show_default=True,
        envvar="SWEEP_STORAGE",
        help="Database of the studies: a SQLite file or PostgreSQL.",
    )(function)


def json_option(function: F) -> F:
    """Adds --json."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")(function)


@contextlib.contextmanager
def reading(storage: str, study: str | None) -> Iterator[tuple[Connection, str]]:
    """Opens the database for reading; the study is the one that was launched last, unless one is named."""
    from sweep import summary

    store = Store(storage)
    try:
        with store.read() as connection:
            yield connection, study or summary.latest(connection)
    finally:
        store.dispose()


def print_json(values: dict[str, Any]) -> None:
    """Prints one JSON document on stdout."""
    from sweep.summary import SCHEMA_VERSION

    click.echo(json.dumps({"schema_version": SCHEMA_VERSION, **values}, indent=2))
