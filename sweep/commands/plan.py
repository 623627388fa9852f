"""`sweep plan SPEC`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from sweep.commands.common import json_option, print_json, storage_option
from sweep.errors import NotFoundError


@click.command()
@click.argument("spec", type=click.Path(path_type=Path))
@click.option("--cap", metavar="USD", help="The hard cap, such as $200; wins over budget.cap.")
@click.option("--set", "overrides", metavar="KEY=VALUE", multiple=True, help="Override a key: search.rank=[8,16].")
@click.option("--probe", "probes", is_flag=True, help="Measure on this machine first: minutes at most, not charged.")
@click.option("--anyway", is_flag=True, help="Probe although the GPU is not the one that the spec names.")
@storage_option
@json_option
def command(
    spec: Path, cap: str | None, overrides: tuple[str, ...], probes: bool, anyway: bool, storage: str, as_json: bool
) -> None:
    """What the cap buys, before a cent is spent.

    Trials per rung, dollars per phase, hours, peak memory, what half or twice the cap would change. Forecasts are
    priors, or an earlier study's measured speed, unless --probe measures; where this machine lacks the GPU that the
    spec names, they are for that one. Nothing is kept.
    """
    from rich.console import Console

    from sweep import launch, pricing, probe, warm_start
    from sweep.launchers.local import LocalLauncher
    from sweep.plan import drawn
    from sweep.spec import load
    from sweep.store import Store
    from sweep.views.plan import show_plan

    wanted = load(spec, overrides, None, cap)
    price = pricing.quote(wanted)
    with tempfile.TemporaryDirectory(prefix="sweep-plan-") as temporary:
        facts = launch.look(wanted, Path(temporary))
        if probes and not anyway:
            launch.compare_gpu(wanted, facts)
        facts = facts if probes else launch.on_named_gpu(wanted, facts)
        launch.settle_precision(wanted, facts)
        try:
            store = Store(storage)
        except NotFoundError:
            launch.settle_memory(None, wanted, facts)
        else:
            try:
                with store.read() as connection:
                    facts = warm_start.apply(connection, wanted, facts)
                launch.settle_memory(store, wanted, facts)
            finally:
                store.dispose()
        found = None
        if probes:
            click.echo(f"measuring on {facts['device']}; nothing is kept or charged", err=True)
            found = probe.measure(wanted, facts, price, Path(temporary), LocalLauncher())
            facts["probe_notes"] = found.notes
    planned = drawn(wanted, facts, price, found)
    if as_json:
        print_json({"study": wanted.study, **planned.as_json(), "memory": facts.get("memory"), "notes": facts["notes"]})
    else:
        show_plan(Console(), planned.as_json(), price.note, facts, wanted.machine.stop_command)
