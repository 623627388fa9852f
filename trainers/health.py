"""Says when a trial is lost: not finite, worse than where it started for long, or clearly so for a short time."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

DECAY = 0.8  # of the smoothed loss
PATIENCE = 0.1  # share of the run that a loss may stay above its start, and at least
MIN_PATIENCE = 20  # steps
MARGIN = 0.1  # nats above the start that say nothing
# Where batches differ the margin is wider by so many standard deviations of theirs, at most by so many nats: a start of
# three batches is off by 0.6 of one, a smoothed loss by a third. They are taken from the first steps, when a rate that
# is far too high has not shown yet.
NOISES, NOISE_STEPS, MOST_NOISE = 2.0, 20, 1.0
# A loss that is CLEAR nats above the start, step by step, and does not fall needs no such patience.
CLEAR = 0.5
CLEAR_SHARE, MIN_CLEAR = 0.02, 10  # of the run, and steps at least
FALLING = 5  # steps over which a loss that comes down again shows it
EXPLODED = 1000.0  # times the usual gradient norm
_HISTORY = 50


@dataclass
class Health:
    """Watches one trial's losses (nats a completion token) and gradient norms, step by step.

    The start is the mean loss of the first three steps: a new adapter is the base model, and warm-up keeps it near. Of
    a trial that was resumed the start is not known, and only figures that are not finite end it.
    """

    steps: int
    resumed: bool = False
    seen: int = 0
    start: float = 0.0
    smooth: float = math.nan
    above: int = 0
    solid: int = 0
    margin: float = MARGIN
    last: float = math.nan
    moves: list[float] = field(default_factory=list)  # of the loss, from one of the first steps to the next
    recent: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)

    def watch(self, loss: float, norm: float) -> str | None:
        """Takes one step's figures; returns why the trial is given up, or None."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss:g}, gradient norm {norm:g}"
        self.seen += 1
        if self.seen <= 3:
            self.start += (loss - self.start) / self.seen
        self.smooth = loss if math.isnan(self.smooth) else DECAY * self.smooth + (1 - DECAY) * loss
        self._look_at_noise(loss)
        bound = self.start + self.margin
        worse = not self.resumed and self.smooth > bound
        self.above = self.above + 1 if worse else 0
        self.solid = self.solid + 1 if worse and loss > bound else 0
        self.recent = [*self.recent[-FALLING:], self.smooth]
        usual = statistics.median(self.norms) if len(self.norms) >= 10 else math.inf
        self.norms = [*self.norms[-_HISTORY:], norm]
        if worse and norm > EXPLODED * usual:
            return f"gradient norm {norm:.3g}, usually {usual:.3g}, and loss {self.smooth:.3g} above {self.start:.3g}"
        clear = self.smooth > bound - MARGIN + CLEAR and self.smooth >= self.recent[0]
        if clear and self.solid >= max(MIN_CLEAR, CLEAR_SHARE * self.steps):
            return f"loss {self.smooth:.3g} and not falling for {self.solid} steps, it started from {self.start:.3g}"
        if self.above >= max(MIN_PATIENCE, PATIENCE * self.steps):
            return f"loss {self.smooth:.3g} for {self.above} steps, above the {self.start:.3g} it started from"
        return None

    def _look_at_noise(self, loss: float) -> None:
        """Widens the margin by what batches differ, as the first steps show it."""
        if not math.isnan(self.last) and len(self.moves) < NOISE_STEPS:
            self.moves.append(abs(loss - self.last))
            # The median of |a - b| of two draws of a normal distribution is 0.954 standard deviations.
            self.margin = MARGIN + min(MOST_NOISE, NOISES * statistics.median(self.moves) / 0.954)
        self.last = loss
