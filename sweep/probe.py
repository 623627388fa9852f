"""A probe: a short measured run on this machine before a plan is drawn. Nothing of it is kept, nothing is charged.

A real worker trains what the search would, as many trials at once as it has slots: a first stretch until everything is
warm, a second one that is measured, and one of them a third one alone, so that the forecasts know what a pack saves.
It is no part of any study: no hold, no database, a folder that is removed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from sweep import slices
from sweep.errors import UsageError, WorkerError
from sweep.fit import full_training
from sweep.launchers.base import Launcher, LaunchError
from sweep.outline import Probed, drawn_configs, prospective
from sweep.pricing import Quote
from sweep.projection import untaught
from sweep.spec import Method, Spec
from trainers.messages import (
    Admit,
    Continue,
    Drop,
    Dropped,
    Ended,
    Evaluated,
    Event,
    Failed,
    Ready,
    Stop,
    TrialConfig,
    WorkerJob,
)

LIMIT_SECONDS = 300.0  # a probe that takes longer is ended; what it measured by then counts
STEPS = 3  # optimizer steps until a trial is warm; twice as many are measured
LARGEST_STATE = 4e9  # bytes of a full-parameter trial's checkpoint, beyond which it is not worth a probe
STATE_BYTES = 14  # of it, a parameter
FENCE = 1
E = TypeVar("E", bound=Event)
POLL_SECONDS = 0.02


def measure(spec: Spec, facts: dict[str, Any], quote: Quote, folder: Path, launcher: Launcher) -> Probed:
    """Measures in `folder`, where the study's data were prepared. Returns after LIMIT_SECONDS at most.

    Raises UsageError where there is nothing to measure, WorkerError if the worker could not train anything.
    """
    if quote.unit == "Mtok":
        raise UsageError("with a price a million tokens there is nothing to measure", "leave --probe out")
    started = time.monotonic()
    probed = Probed(untaught(prospective(spec, facts, quote)))
    home = folder / "probe"
    boot_id, now_ms = launcher.boot()
    try:
        launcher.start(_job(spec, facts, launcher.worker_command(home), folder, boot_id, now_ms), home)
        _Talk(spec, facts, launcher, home, probed, started + LIMIT_SECONDS).go_on()
    except LaunchError as error:
        raise WorkerError(f"the probe could not be started: {error}") from error
    finally:
        if not launcher.wait_dead(home, 0.0):
            launcher.stop(home)
            launcher.wait_dead(home, LIMIT_SECONDS)
    probed.seconds = time.monotonic() - started
    return probed


def _job(
    spec: Spec, facts: dict[str, Any], command: list[str], folder: Path, boot_id: str, origin_boot_ms: int
) -> WorkerJob:
    """As of a study's worker (sweep/workers.py), but with all its time at once; and no end of the probe ends the
    rental."""
    limit_ms = round(2000 * LIMIT_SECONDS)
    return WorkerJob(
        worker="probe",
        command=command,
        model=spec.model,
        data=str(folder / "data"),
        rung_rows=facts["plan"]["rung_rows"],
        origin_boot_ms=origin_boot_ms,
        boot_id=boot_id,
        fence=FENCE,
        paid_ms=limit_ms,
        work_ms=limit_ms,
        checkpoint_ms=limit_ms,
        grace_ms=slices.GRACE_MS,
        device=spec.machine.device,
        threads=spec.machine.threads,
        timings=spec.machine.timings,
        slots=None if spec.machine.slots == "auto" else spec.machine.slots,
        max_rank=max(spec.search.rank),
        precision=spec.search.precision,
        methods=list(spec.search.method),
        **full_training(spec, facts),
    )


class _Talk:
    """The conversation with the probe's worker, which teaches the forecasts."""

    def __init__(
        self, spec: Spec, facts: dict[str, Any], launcher: Launcher, home: Path, probed: Probed, until: float
    ) -> None:
        self._spec, self._facts, self._launcher, self._home = spec, facts, launcher, home
        self._probed, self._until = probed, until
        self._measured = 0
        self._said: Event | None = None
        self._events = self._listen()

    def go_on(self) -> None:
        """Measures one method after the other, and lets the worker go."""
        ready = self._wait(Ready)
        if ready is not None:
            self._probed.projector.observe_load(ready.at_ms)
            self._probed.slots = ready.slots.get("lora")
            first = 0
            for method in self._spec.search.method:
                if method == "full" and STATE_BYTES * self._facts["parameters"] > LARGEST_STATE:
                    gigabytes = STATE_BYTES * self._facts["parameters"] / 1e9
                    words = f"full training is not probed: its state alone is {gigabytes:,.0f} GB; from priors"
                    self._probed.notes.append(words)
                    continue
                count = ready.slots.get(method, 0)
                self._train(method, range(first, first + count))
                first += count
        self._launcher.send(self._home, Stop(fence=FENCE, within_ms=10_000))
        self._wait(Ended)
        if self._said is not None:
            self._probed.projector.observe_compile(self._said.usage.get("compile", 0))
        if not self._measured:
            raise WorkerError(f"the probe measured nothing{self._why()}", "leave --probe out: the plan uses priors")
        if time.monotonic() >= self._until:
            self._probed.notes.append(f"the probe was ended after {LIMIT_SECONDS:.0f} s")

    def _train(self, method: Method, numbers: range) -> None:
        """Trains so many trials of a method at once; the first one of them that is left goes on alone."""
        drawn = drawn_configs(self._spec, method, self._probed.projector.plan.examples)
        configs = {number: replace(drawn[number % len(drawn)], number=number) for number in numbers}
        for number, config in configs.items():
            folder = str(self._home / "trials" / str(number))
            until = self._tokens(config, STEPS)
            self._send(Admit(fence=FENCE, config=config, attempt="probe", folder=folder, until_tokens=until))
        warm = self._arrive(configs)
        going_on = {number for number, event in warm.items() if not event.final}
        for number in sorted(going_on):
            self._send(Continue(fence=FENCE, trial=number, until_tokens=self._tokens(configs[number], 3 * STEPS)))
        found = {n: event for n, event in warm.items() if event.final}
        found |= self._arrive({number: configs[number] for number in going_on})
        self._learn(configs, found)
        alone = next((number for number, event in sorted(found.items()) if not event.final), None)
        for number in [number for number in found if number != alone]:
            self._send(Drop(fence=FENCE, trial=number))
        if alone is None:
            return
        if len(numbers) > 1:
            until = self._tokens(configs[alone], 5 * STEPS)
            self._send(Continue(fence=FENCE, trial=alone, until_tokens=until))
            self._learn(configs, self._arrive({alone: configs[alone]}))
        self._send(Drop(fence=FENCE, trial=alone))

    def _tokens(self, config: TrialConfig, steps: int) -> int:
        plan = self._probed.projector.plan
        return max(round(steps * config.batch_size * plan.run_tokens / plan.examples), 1)

    def _learn(self, configs: dict[int, TrialConfig], found: dict[int, Evaluated]) -> None:
        for number, event in sorted(found.items()):
            self._probed.projector.observe_evaluation(configs[number], event)
            self._measured += 1

    def _arrive(self, expected: dict[int, TrialConfig]) -> dict[int, Evaluated]:
        """Waits until each of them was evaluated, has failed, or the time is up."""
        found: dict[int, Evaluated] = {}
        missing = set(expected)
        while missing and (event := next(self._events, None)) is not None:
            if isinstance(event, Evaluated):
                found[event.trial] = event
                missing.discard(event.trial)
            elif isinstance(event, Failed | Dropped):
                missing.discard(event.trial)
                if isinstance(event, Failed):
                    self._probed.notes.append(f"a trial of the probe failed: {event.message}")
        return found

    def _wait(self, kind: type[E]) -> E | None:
        return next((event for event in self._events if isinstance(event, kind)), None)

    def _listen(self) -> Iterator[Event]:
        """What the worker says, until it has ended or the time is up."""
        offset = 0
        while time.monotonic() < self._until:
            alive = self._launcher.alive(self._home)
            for after, event in self._launcher.read_events(self._home, offset):
                offset, self._said = after, event
                yield event
                if isinstance(event, Ended):
                    return
            if not alive:
                return
            time.sleep(POLL_SECONDS)

    def _send(self, command: Any) -> None:
        self._launcher.send(self._home, command)

    def _why(self) -> str:
        """The worker's own last words."""
        message = getattr(self._said, "message", "")
        return f": {message}" if message else ""
