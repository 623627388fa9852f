"""`sweep reprice STUDY PRICE`."""

from __future__ import annotations

import click

from sweep.commands.common import storage_option
from sweep.errors import UsageError


@click.command()
@click.argument("study")
@click.argument("price")
@click.option("--note", metavar="TEXT", default="", help="Where the price comes from.")
@storage_option
def command(study: str, price: str, note: str, storage: str) -> None:
    """Tell a study that its machine's price has changed: PRICE is $1.49/hour, $0.32/kWh or $0.48/Mtok.

    It counts from now on, also for a running worker; what was used before keeps the old price. A worker whose paid time
    the cap no longer covers at the new price ends sooner. Moving to another machine? Reprice, then resume there.
    """
    from budgets.money import MoneyError, parse_rate, usd
    from sweep import pricing, records
    from sweep.launchers.local import LocalLauncher
    from sweep.store import Store

    try:
        rate = parse_rate(price)
    except MoneyError as error:
        raise UsageError(str(error)) from error
    store = Store(storage)
    try:
        with store.write() as connection:
            found = records.study(connection, study)
            tariff = pricing.reprice(connection, found, rate, LocalLauncher().boot(), note)
    finally:
        store.dispose()
    click.echo(f"study {study}: {usd(tariff.now)}/{found.unit} from now on, holds at {usd(tariff.ceiling)}", err=True)
