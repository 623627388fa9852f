"""`sweep resume STUDY`."""

from __future__ import annotations

import click

from sweep.commands.common import json_option, storage_option
from sweep.errors import UsageError


@click.command()
@click.argument("study")
@click.option("--cap", metavar="USD", help="The new hard cap over everything, such as $250; it may also be lower.")
@storage_option
@json_option
def command(study: str, cap: str | None, storage: str, as_json: bool) -> None:
    """Go on after Ctrl-C, a crash or a reboot, or spend more.

    The ledger is audited first. A worker that still runs is taken over, one that died is settled.
    """
    from budgets.money import MoneyError, parse_usd
    from sweep.commands.drive import drive
    from sweep.store import Store

    try:
        micros = None if cap is None else parse_usd(cap)
    except MoneyError as error:
        raise UsageError(f"--cap: {error}") from error
    if micros is not None and micros <= 0:
        raise UsageError(f"--cap: the cap must be positive, not {cap}")
    store = Store(storage)
    try:
        drive(store, study, micros, as_json=as_json)
    finally:
        store.dispose()
