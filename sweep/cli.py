"""The `sweep` command. Verbs live one a file in sweep/commands/ and import what they need when they run."""

from __future__ import annotations

import importlib
import json
import sys

import click

from sweep.errors import SweepError

VERBS = {
    "plan": "What the cap buys, before a cent is spent.",
    "launch": "Start a study under a hard cap.",
    "resume": "Go on after Ctrl-C, a crash or a reboot, or spend more.",
    "close": "End a study for good.",
    "status": "Budget, projection and what runs.",
    "trials": "All trials, best first.",
    "best": "The best trial and where its weights are.",
    "compare": "LoRA or full training: the verdict, with its cost.",
    "show": "A study's resolved spec, or one trial.",
    "statement": "Where every cent went.",
    "list": "The studies of this database.",
    "reconcile": "Make the books agree with the provider's bill.",
    "reprice": "Tell a study that its machine's price has changed.",
    "audit": "Check every invariant of the ledger; silent when all hold.",
    "prices": "Listed machine prices.",
    "fit": "What fits on a GPU, and what would make the rest fit.",
    "help": "Exit codes and other topics.",
}


class _Lazy(click.Group):
    """Imports a verb's module when it is called, so that `sweep --help` answers at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in VERBS:
            return None
        command: click.Command = importlib.import_module(f"sweep.commands.{name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except SweepError as error:
            _tell(error, as_json="--json" in sys.argv)
            ctx.exit(error.exit_code)


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="capsweep", prog_name="sweep")
def main() -> None:
    """Fine-tuning sweeps under a hard dollar cap: LoRA against full training, with every cent accounted for."""


def _tell(error: SweepError, *, as_json: bool) -> None:
    if as_json:
        document = {"error": {"code": error.code, "message": str(error), "hint": error.hint}}
        click.echo(json.dumps(document), err=True)
        return
    hint = f" ({error.hint})" if error.hint else ""
    click.echo(f"sweep: {error}{hint}", err=True)
