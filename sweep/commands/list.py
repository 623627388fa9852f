"""`sweep list`."""

from __future__ import annotations

import click

from sweep.commands.common import json_option, print_json, storage_option


@click.command()
@storage_option
@json_option
def command(storage: str, as_json: bool) -> None:
    """The studies of this database, oldest first."""
    from rich.console import Console

    from sweep import summary
    from sweep.store import Store
    from sweep.views import tables

    store = Store(storage)
    try:
        with store.read() as connection:
            values = summary.listing(connection)
    finally:
        store.dispose()
    if as_json:
        print_json({"studies": values})
    else:
        tables.show_list(Console(), values)
