"""`sweep best [STUDY]`."""

from __future__ import annotations

import click

from sweep.commands.common import json_option, print_json, reading, storage_option


@click.command()
@click.argument("study", required=False)
@storage_option
@json_option
def command(study: str | None, storage: str, as_json: bool) -> None:
    """The best configuration: parameters, loss, cost, whether it is confirmed, and where its weights are."""
    from rich.console import Console

    from sweep import summary
    from sweep.views import tables

    with reading(storage, study) as (connection, name):
        values = summary.best(connection, name)
    if as_json:
        print_json(values)
    else:
        tables.show_best(Console(), values, f"sweep show {name} {values['trial']['number']}")
