"""`sweep help TOPIC`."""

from __future__ import annotations

import click

TOPICS = {
    "exit-codes": """\
  0  ok; the cap may be spent, but there is a winner
  1  failed: a worker died again and again, or something unforeseen
  2  usage or spec: a flag, an answer or a key is wrong
  3  the cap ended before a trial was trained to its end, or cannot pay for a start
  4  no such study, trial, database or listed machine; or nothing there yet to show or to compare
  5  an invariant of the ledger does not hold, or an overrun froze the study
  6  the database is busy or unreachable, or another orchestrator drives the study
  7  the model or the data cannot be used; nothing was spent
  8  the disk is full; what ran can be resumed
130  interrupted; everything is checkpointed and settled"""
}


@click.command()
@click.argument("topic", type=click.Choice(list(TOPICS)), required=False)
@click.pass_context
def command(context: click.Context, topic: str | None) -> None:
    """Exit codes and other topics; without one, the verbs."""
    assert context.parent is not None
    click.echo(TOPICS[topic] if topic else context.parent.get_help())
