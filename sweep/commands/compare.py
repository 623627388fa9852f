"""`sweep compare [STUDY]`."""

from __future__ import annotations

import click

from sweep.commands.common import json_option, print_json, reading, storage_option


@click.command()
@click.argument("study", required=False)
@click.option("--claims", is_flag=True, help="What is often said of LoRA and full training, beside what was measured.")
@storage_option
@json_option
def command(study: str | None, claims: bool, storage: str, as_json: bool) -> None:
    """LoRA or full training: the best of each on the test rows, over seeds, with its cost and its uncertainty.

    Exits with 4 where nothing was confirmed; what the search found is shown all the same.
    """
    from rich.console import Console

    from sweep import comparison
    from sweep.views import compare

    with reading(storage, study) as (connection, name):
        values = comparison.compare(connection, name)
    if as_json:
        print_json(values)
    else:
        compare.show_compare(Console(), values, with_claims=claims)
    if error := comparison.nothing_confirmed(values):
        raise error
