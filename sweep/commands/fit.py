"""`sweep fit SPEC`."""

from __future__ import annotations

import re
from pathlib import Path

import click

from sweep.commands.common import json_option, print_json, storage_option
from sweep.errors import NotFoundError, UsageError


@click.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--memory", metavar="SIZE", help="Of the GPU, such as 80GB as cards are sold; wins over machine.gpu.")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key: search.rank=[8,16].")
@storage_option
@json_option
def command(spec: Path, memory: str | None, overrides: tuple[str, ...], storage: str, as_json: bool) -> None:
    """What fits on a GPU, and what would make the rest fit.

    Predicts the peak memory of every class of configurations in the spec's space: on the GPU that the spec names, or on
    this machine's. Neither a GPU nor data is needed, and of the model its config.json alone.
    """
    from rich.console import Console

    from sweep import fit, launch
    from sweep.spec import load
    from sweep.store import Store
    from sweep.views.fit import show_fit
    from trainers.memory import Shape

    wanted = load(spec, overrides)
    stated = None if memory is None else _bytes(memory)
    facts = launch.look_at_model(wanted)
    card = fit.pick_card(wanted, facts, stated)
    try:
        store = Store(storage)
    except NotFoundError:
        corrections = {}
    else:
        try:
            with store.read() as connection:
                corrections = fit.learned(connection, wanted.model, card.name)
        finally:
            store.dispose()
    rows = fit.rows(wanted, Shape(**facts["shape"]), card, wanted.data.max_tokens, corrections)
    values = fit.as_json(wanted, facts, card, rows, corrections)
    if as_json:
        print_json(values)
    else:
        show_fit(Console(), values)


def _bytes(text: str) -> int:
    """A card's memory; GB means GiB, as cards are sold. Raises UsageError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:G|GB|GiB)\s*", text, flags=re.IGNORECASE)
    if found is None or float(found[1]) <= 0:
        raise UsageError(f"--memory {text!r} is no size of a GPU's memory", "write it as 80GB")
    return int(float(found[1]) * 2**30)
