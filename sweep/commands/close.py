"""`sweep close STUDY`."""

from __future__ import annotations

import click

from sweep.commands.common import storage_option


@click.command()
@click.argument("study")
@storage_option
def command(study: str, storage: str) -> None:
    """End a study for good: its paused trials are told to Optuna as pruned."""
    from sweep.run import close
    from sweep.store import Store

    store = Store(storage)
    try:
        parked = close(store, study)
    finally:
        store.dispose()
    click.echo(f"study {study} is closed; {parked} paused trials were told as pruned", err=True)
