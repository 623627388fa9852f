"""`sweep statement [STUDY]`."""

from __future__ import annotations

import click

from sweep.commands.common import json_option, print_json, reading, storage_option


@click.command()
@click.argument("study", required=False)
@click.option("--all", "everything", is_flag=True, help="Every trial on a line of its own.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "csv", "beancount"]),
    default="table",
    show_default=True,
    help="csv: one line an account; beancount: every transfer, with the balances asserted.",
)
@storage_option
@json_option
def command(study: str | None, everything: bool, form: str, storage: str, as_json: bool) -> None:
    """Where every cent went: trials, overhead, idle; they add up to what was spent."""
    from rich.console import Console

    from sweep import summary
    from sweep.views import tables

    with reading(storage, study) as (connection, name):
        if form == "beancount":
            click.echo(summary.beancount(connection, name), nl=False)
            return
        values = summary.statement(connection, name)
    if as_json or form == "json":
        print_json(values)
    elif form == "csv":
        click.echo(tables.statement_csv(values), nl=False)
    else:
        tables.show_statement(Console(), values, everything=everything)
