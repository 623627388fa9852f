"""`sweep launch SPEC`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from sweep.commands.common import json_option, storage_option
from sweep.errors import UsageError


@click.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--cap", metavar="USD", help="The hard cap, such as $200; wins over budget.cap.")
@click.option("--study", metavar="NAME", help="The study's name; wins over the spec's.")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key: search.rank=[8,16].")
@click.option(
    "--anyway",
    is_flag=True,
    help="Launch although the spec names another GPU, or the plan trains nothing.",
)
@click.option("--yes", is_flag=True, help="Do not ask.")
@storage_option
@json_option
def command(
    spec: Path,
    cap: str | None,
    study: str | None,
    overrides: tuple[str, ...],
    anyway: bool,
    yes: bool,
    storage: str,
    as_json: bool,
) -> None:
    """Start a study under a hard cap.

    Model, data and price are looked at first; that is not paid for. Then the plan is shown and you are asked once.
    """
    from rich.console import Console

    from sweep import launch, pricing, warm_start
    from sweep.commands.drive import drive
    from sweep.launchers.local import LocalLauncher
    from sweep.plan import drawn, settle
    from sweep.spec import load
    from sweep.store import Store
    from sweep.views.plan import show_plan

    wanted = load(spec, overrides, study, cap)
    price = pricing.quote(wanted)
    if not yes and not sys.stdin.isatty():
        raise UsageError("launching spends money and nobody is there to ask", "add --yes")
    store = Store(storage, create=True)
    try:
        folder = launch.study_folder(wanted.study)
        launch.refuse_taken(store, wanted.study, folder)
        with launch.provisional(folder):
            facts = launch.look(wanted, folder)
            if not anyway:
                launch.compare_gpu(wanted, facts)
            launch.settle_precision(wanted, facts)
            with store.read() as connection:
                facts = warm_start.apply(connection, wanted, facts)
            launch.settle_memory(store, wanted, facts)
            planned = drawn(wanted, facts, price)
            wanted, facts = settle(wanted, facts, price)
            show_plan(Console(stderr=True), planned.as_json(), price.note, facts, wanted.machine.stop_command)
            launch.refuse_optimizer(wanted)
            launch.refuse_device(wanted, facts)
            if not anyway:
                launch.refuse_nothing(planned, warm_start.speed_from(facts))
            if not yes and not click.confirm("Launch?", err=True):
                raise UsageError("not launched; nothing was spent")
        launch.create(store, wanted, facts, price, folder, LocalLauncher().boot())
        drive(store, wanted.study, None, as_json=as_json)
    finally:
        store.dispose()
