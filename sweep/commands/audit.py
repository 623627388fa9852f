"""`sweep audit [STUDY]`."""

from __future__ import annotations

import click

from sweep.commands.common import json_option, print_json, reading, storage_option
from sweep.errors import InvariantError


@click.command()
@click.argument("study", required=False)
@storage_option
@json_option
def command(study: str | None, storage: str, as_json: bool) -> None:
    """Check every invariant; silent when all hold, exit code 5 and the first one otherwise."""
    from sweep.audit import violations

    with reading(storage, study) as (connection, name):
        found = violations(connection, name)
    if as_json:
        print_json({"study": name, "violations": found})
    if found:
        more = f"; and {len(found) - 1} more" if len(found) > 1 else ""
        raise InvariantError(f"{name}: {found[0]}{more}", "nothing will be held for this study until it is mended")
