"""`sweep show [STUDY] [TRIAL]`."""

from __future__ import annotations

import re

import click

from sweep.commands.common import json_option, print_json, reading, storage_option
from sweep.errors import NotFoundError, UsageError


@click.command()
@click.argument("what", nargs=-1, metavar="[STUDY] [TRIAL]")
@storage_option
@json_option
def command(what: tuple[str, ...], storage: str, as_json: bool) -> None:
    """A study's resolved spec, or one trial by its number.

    `sweep show 3` is trial 3 of the latest study, `sweep show words` a study's spec, `sweep show words 3` its trial 3,
    `sweep show words 3.2` what repeats that under the second of the new seeds.
    """
    from rich.console import Console

    from sweep import records, summary
    from sweep.views import tables

    numbers = [part.replace(".", "·") for part in what if re.fullmatch(r"\d+([.·]\d+)?", part)]
    names = [part for part in what if part.replace(".", "·") not in numbers]
    if len(names) > 1 or len(numbers) > 1:
        raise UsageError(f"cannot show {' '.join(what)}", "write: sweep show [STUDY] [TRIAL]")
    with reading(storage, names[0] if names else None) as (connection, name):
        study = records.study(connection, name)
        trials = summary.trials(connection, name) if numbers else []
    if not numbers:
        if as_json:
            print_json({"study": name, "spec": study.spec.resolved(), "facts": study.facts})
        else:
            tables.show_spec(Console(), name, study.spec.resolved(), study.facts)
        return
    found = next((trial for trial in trials if numbers[0] in {trial["label"], str(trial["number"])}), None)
    if found is None:
        raise NotFoundError(f"study {name} has no trial {numbers[0]}", f"`sweep trials {name}` lists them")
    if as_json:
        print_json({"study": name, "trial": found})
    else:
        tables.show_trial(Console(), found)
