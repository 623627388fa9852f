"""`sweep trials [STUDY]`."""

from __future__ import annotations

import click

from sweep.commands.common import json_option, print_json, reading, storage_option


@click.command()
@click.argument("study", required=False)
@click.option("--limit", type=click.IntRange(min=1), help="Show so many at most.")
@storage_option
@json_option
def command(study: str | None, limit: int | None, storage: str, as_json: bool) -> None:
    """All trials, best first: state, rung, loss, cost."""
    from rich.console import Console

    from sweep import summary
    from sweep.views import tables

    with reading(storage, study) as (connection, name):
        values = summary.trials(connection, name)
    if as_json:
        print_json({"study": name, "trials": values[:limit]})
    else:
        tables.show_trials(Console(), name, values, limit)
