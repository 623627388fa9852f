"""`sweep prices`."""

from __future__ import annotations

import click

from sweep.commands.common import json_option, print_json
from sweep.errors import NotFoundError


@click.command()
@click.option("--gpu", metavar="NAME", help="Only machines whose GPU's name contains this.")
@click.option("--provider", metavar="NAME", help="Only this provider's machines.")
@json_option
def command(gpu: str | None, provider: str | None, as_json: bool) -> None:
    """Listed machine prices, cheapest a GPU first: on demand and spot, what is billed at least, date and source."""
    import dataclasses
    import datetime

    from rich.console import Console

    from budgets.prices import listed
    from sweep.views import tables

    rows = [
        price
        for price in listed()
        if (gpu is None or gpu.lower() in price.gpu.lower())
        and (provider is None or provider.lower() == price.provider.lower())
    ]
    if not rows:
        known = ", ".join(sorted({price.gpu for price in listed()}))
        wanted = f"a {gpu}" if gpu else "a GPU"
        where = f" at {provider}" if provider else ""
        raise NotFoundError(f"no listed machine has {wanted}{where}", f"listed: {known}")
    rows.sort(key=lambda price: (price.gpu, price.micros_per_hour / price.gpu_count))
    if as_json:
        plain = [dataclasses.asdict(price) | {"as_of": price.as_of.isoformat()} for price in rows]
        print_json({"prices": plain})
    else:
        tables.show_prices(Console(), rows, datetime.date.today())
