"""What the ledger's tests share: databases that are made at once, and clean processes to fork from."""

from __future__ import annotations

import multiprocessing
import uuid
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from sqlalchemy import create_engine, make_url, text


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of an empty database, once on SQLite and once on PostgreSQL.

    There it is an empty schema: it takes a thousandth of the time of a database, and these tests want many.
    """
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/studies.db"
    server = make_url(request.getfixturevalue("postgres_server"))
    name = f"t{uuid.uuid4().hex}"
    engine = create_engine(server)
    with engine.begin() as connection:
        connection.execute(text(f"CREATE SCHEMA {name}"))
    engine.dispose()
    return server.update_query_dict({"options": f"-csearch_path={name}"}).render_as_string(hide_password=False)


@pytest.fixture(scope="package")
def pool() -> Iterator[ProcessPoolExecutor]:
    """Two small processes without threads or open connections. A forked pytest would be neither small nor safe."""
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor
