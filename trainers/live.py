"""A live trial, as the worker knows it: who it is, how far it came, what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainers.engine import Position
from trainers.messages import TrialConfig


@dataclass
class LiveTrial:
    """A trial in a slot. `train_*` and `loss_*` cover the stretch since it was admitted or evaluated."""

    config: TrialConfig
    attempt: str
    folder: Path
    at: Position
    until_tokens: int | None
    standing: bool = False  # evaluated, until it is told what next
    saved: str | None = None  # the newest checkpoint
    saved_step: int = -1
    saved_mark_ns: int = 0  # the worker's trained time at that checkpoint
    train_tokens: int = 0
    train_ns: int = 0
    loss_sum: float = 0.0
    loss_steps: int = 0
    shown_step: int = 0  # of the last Progress

    @property
    def number(self) -> int:
        """The trial's number."""
        return self.config.number

    @property
    def centre(self) -> str:
        """Its cost centre."""
        return f"trial:{self.number}"

    def arrived(self) -> bool:
        """Says whether it stands at its target or its end."""
        return self.at.done or (self.until_tokens is not None and self.at.tokens >= self.until_tokens)

    def place(self) -> dict[str, Any]:
        """Returns the fields that every TrialEvent has."""
        return {"trial": self.number, "attempt": self.attempt, "step": self.at.step, "tokens": self.at.tokens}
