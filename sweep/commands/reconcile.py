"""`sweep reconcile STUDY --bill USD`."""

from __future__ import annotations

import click

from sweep.commands.common import json_option, print_json, storage_option
from sweep.errors import InvariantError, UsageError


@click.command()
@click.argument("study")
@click.option(
    "--bill", metavar="USD", required=True, help="What the provider billed for the whole study, such as $41.20."
)
@click.option("--note", metavar="TEXT", default="", help="Why it differs, or the invoice's number.")
@storage_option
@json_option
def command(study: str, bill: str, note: str, storage: str, as_json: bool) -> None:
    """Make the books agree with the provider's bill.

    The difference becomes a refund, or a charge to overhead:bill; what the cap does not cover is an overrun, which
    freezes the study (exit code 5). Nothing that was written before changes.
    """
    from budgets.money import MoneyError, parse_usd, usd
    from sweep import summary
    from sweep.run import reconcile
    from sweep.store import Store

    try:
        micros = parse_usd(bill)
    except MoneyError as error:
        raise UsageError(f"--bill: {error}") from error
    if micros < 0:
        raise UsageError(f"--bill: a bill cannot be negative: {bill}")
    store = Store(storage)
    try:
        difference, balances = reconcile(store, study, micros, note)
    finally:
        store.dispose()
    if as_json:
        overrun = summary.money(balances.overrun)
        print_json({"study": study, "difference": summary.money(difference), "overrun": overrun})
    else:
        words = "the bill is what was charged"
        if difference < 0:
            words = f"the bill is {usd(-difference)} lower: refunded"
        elif difference > 0:
            words = f"the bill is {usd(difference)} higher: charged to overhead:bill"
        click.echo(f"study {study}: {words}; spent {usd(balances.spent)} of {usd(balances.cap)}", err=True)
    if balances.overrun:
        raise InvariantError(f"{usd(balances.overrun)} were used beyond the cap; study {study} is frozen")
