"""`sweep prices`."""

from __future__ import annotations

import click

from sweep.commands.common import json_option, print_json
from sweep.errors import NotFoundError


@click.command()
@click.option("--gpu", metavar="NAME", help="Only machines whose GPU's name contains this.")
@json_option
def command(gpu: str | None, as_json: bool) -> None:
    """Listed machine prices with date and source, cheapest per GPU first."""
    import dataclasses

    from rich.console import Console
    from rich.table import Table

    from budgets.money import usd
    from budgets.prices import listed

    rows = [price for price in listed() if gpu is None or gpu.lower() in price.gpu.lower()]
    if not rows:
        known = ", ".join(sorted({price.gpu for price in listed()}))
        raise NotFoundError(f"no listed machine has a {gpu}", f"listed: {known}")
    rows.sort(key=lambda price: (price.gpu, price.micros_per_hour / price.gpu_count))
    if as_json:
        plain = [dataclasses.asdict(price) | {"as_of": price.as_of.isoformat()} for price in rows]
        print_json({"prices": plain})
        return
    table = Table(box=None, pad_edge=False)
    for name in ("GPU", "count", "provider", "instance", "as of"):
        table.add_column(name, overflow="fold")
    table.add_column("$/hour", justify="right", no_wrap=True)
    for price in rows:
        per_hour = usd(price.micros_per_hour, 2)
        table.add_row(price.gpu, str(price.gpu_count), price.provider, price.instance, str(price.as_of), per_hour)
    Console().print(table)
