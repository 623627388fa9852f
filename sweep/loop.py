"""The sweep loop: settle, judge, project, fill, stop.

Our tables are the only state; what is kept in memory (forecasts, what a worker was told) is rebuilt from them after a
crash. Every decision follows from the tables. On recorded timings it is taken after each event, so the same events lead
to the same study; on a clock after all that have come.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from sweep import current, endgame, feasibility, finale, records, rungs, seats, space, stopping, telling, triage, turns
from sweep.allocation import allocation_of
from sweep.apply import take_in
from sweep.blame import Deaths, suspects
from sweep.current import Current
from sweep.decisions import decide
from sweep.endgame import Race
from sweep.errors import BudgetError, DiskError, Interrupted, StoreError, WorkerError
from sweep.instruct import Instructor
from sweep.launchers.base import Launcher
from sweep.projection import projector_of
from sweep.records import TrialRow, WorkerRow
from sweep.rungs import Results
from sweep.store import Store
from sweep.study import Memory
from sweep.triage import Funds
from sweep.workers import Workers
from trainers.messages import BaseEvaluated, Checkpointed, Evaluated, Event, Method, Paused, Ready, Release, Stop

POLL_SECONDS = 0.02
STOP_MS = 25_000  # a worker that is told to stop has so long to checkpoint, or as long as the tail is paid for
LATE_MS = 5_000  # a worker that lives so long beyond its paid time has no watchdog that works


@dataclass
class Stopping:
    """What Ctrl-C sets."""

    asked: bool = False


class Sweep:
    """Drives one study to its end. The caller holds the right to (Store.drive) and has raised the fence."""

    def __init__(
        self,
        store: Store,
        name: str,
        launcher: Launcher,
        memory: Memory,
        stopping: Stopping,
        notify: Callable[[], None] = lambda: None,
    ) -> None:
        """`notify` is called after every step that changed something; it must not raise."""
        self.store = store
        self.name = name
        self.launcher = launcher
        self.memory = memory
        self.notify = notify
        with store.read() as connection:
            self.study = records.study(connection, name)
            self.projector = projector_of(self.study, connection)
        self._policy = rungs.policy(self.study.spec.search, self.projector.plan.shares)
        self.allocation = allocation_of(self.study, self.projector.plan.shares)
        self.workers = Workers(store, self.study, launcher, self.projector)
        self.instructor = Instructor(launcher, self.projector.plan)
        self.asked_to = stopping
        self._stopping = False
        self._deaths = Deaths()
        self._alone = self._suspects()  # trials that train with nobody beside them
        self._unreleased: Path | None = None  # the folder of a worker that ended, whose watchdog waits for a word
        self._disk_message = ""
        self._again = True  # a step is due although no event came
        self._said = False  # how the race ended
        self._current: Current | None = None
        self._gap_ms = 0  # the longest recent silence between two reports
        self._lengths = self.workers.lengths()

    @property
    def interrupted(self) -> bool:
        """Whether the user asked to stop."""
        return self.asked_to.asked

    def run(self) -> None:
        """Steps until nothing runs and nothing more is affordable or worth its price.

        Raises Interrupted after a request to stop, DiskError, WorkerError, InvariantError, StoreError.
        """
        try:
            self._run()
        except StoreError:
            self._let_go(stop=False)  # it is tried again, or another orchestrator goes on
            raise
        finally:
            self._let_go(stop=not self.interrupted)

    def _run(self) -> None:
        self.workers.recover()
        reattached = self._worker()
        self.instructor.reattached = reattached.id if reattached else None
        telling.replay(self.memory, *self._trials())
        while True:
            changed = self.step()
            self.notify()
            if self._over():
                break
            if not changed:
                time.sleep(POLL_SECONDS)  # the machine trains meanwhile, and on a CPU it needs ours
        self._park()
        self.notify()
        if self._disk_message:
            raise DiskError(self._disk_message, f"free some space, then: sweep resume {self.name}")
        if self.interrupted:
            raise Interrupted(f"study {self.name} is checkpointed and settled", f"sweep resume {self.name}")

    def step(self) -> bool:
        """One step of the loop; returns whether anything changed."""
        self._reprice()
        changed = self._settle() or self._again
        self._again = False
        if changed or self.interrupted:
            self._judge()
            self._project()
            self._tell_ended()
            self._seat(filled=False)
            self._seat(filled=self._fill())
            self._tell_ended()
        return changed

    # Settle

    def _reprice(self) -> None:
        """Puts the study, and its living worker, under a price that was changed since the last look."""
        if self.workers.follow_price(self._worker(), self._lengths):
            self.study = self.workers.study
            if (worker := self._worker()) is not None:
                self.launcher.send(Path(worker.folder), self.workers.slice(worker, self._lengths))

    def _settle(self) -> bool:
        """Applies the next events, pays for the next slice when it is due, sees a dead worker out."""
        worker = self._worker()
        if worker is None:
            return False
        folder = Path(worker.folder)
        alive = self.workers.alive(worker)
        record = self.launcher.read_usage(folder)
        # The last record is written after the last event, so events read from here on are all there will be.
        over = (record is not None and record.ended) or not alive
        # Paid for before its events are read: a pack may say more than we can keep up with.
        renews = not (over or self._stopping)
        if renews and self.workers.renewal_due(worker, self._lengths, self._gap_ms):
            self.launcher.send(folder, self.workers.slice(self.workers.renew(worker, self._lengths), self._lengths))
            return True
        if renews and self.study.timings is None and self._search_is_over(worker):
            return True
        if events := self.launcher.read_events(folder, worker.offset):
            heard_ms = worker.at_ms
            for event, new in take_in(self.store, self.study, worker, events):
                if worker.state == "ready":
                    self._gap_ms, heard_ms = max(event.at_ms - heard_ms, self._gap_ms * 3 // 4), event.at_ms
                if new:  # what is not stored would not be learned again after a restart
                    self._learn(event)
            self._lengths = self.workers.lengths(self._gap_ms)
            return True
        if over:
            self._bury(worker)
            return True
        if self.study.timings is None and self.workers.now_ms(worker) > worker.paid_ms + LATE_MS:
            self.launcher.stop(folder)  # its watchdog is stopped or hangs: nobody else ends it
        return False

    def _learn(self, event: Event) -> None:
        if isinstance(event, Evaluated | Paused | Checkpointed):
            with self.store.read() as connection:
                trial = records.trial(connection, self.name, event.trial)
            assert trial is not None
            self.projector.observe(trial.config, event)
        elif isinstance(event, Ready):
            self.projector.observe_load(event.at_ms)
        elif isinstance(event, BaseEvaluated):
            with self.store.read() as connection:
                self.study = self.workers.study = records.own_study(connection, self.name, self.study.fence)

    def _bury(self, worker: WorkerRow) -> None:
        folder = Path(worker.folder)
        if not self.launcher.alive(folder):
            self.workers.see_dead(worker)
        self.workers.bury(worker)
        self.instructor.forget()
        self._unreleased = folder
        if worker.why.startswith("disk"):
            self._disk_message = f"the disk is full: {worker.why.removeprefix('disk: ')}"
            self._stopping = True
        self._alone = self._suspects()
        with self.store.read() as connection:
            enough = self._deaths.another(worker, records.kept(connection, self.name))
        if enough and not self._stopping:
            raise WorkerError(enough, f"see {folder / 'worker.log'}, then: sweep resume {self.name}")

    def _suspects(self) -> set[int]:
        with self.store.read() as connection:
            return suspects(connection, self.name)

    def _let_go(self, *, stop: bool) -> None:
        """Releases the watchdog of the worker that ended, which waits to hear whether the machine is still needed."""
        if self._unreleased is not None:
            self.launcher.send(self._unreleased, Release(fence=self.study.fence, stop=stop))
            self._unreleased = None

    # Judge

    def _judge(self) -> None:
        # Of several the best first: who is promoted before them is what the others are compared with.
        judging = [trial for trial in self._everyone() if trial.state == "judging"]
        for trial in sorted(judging, key=lambda t: (t.loss is None, t.loss, t.number)):
            self._decide(trial, *self._trials())

    def _decide(self, trial: TrialRow, trials: list[TrialRow], results: Results) -> None:
        judgement = decide(self.study, trial, trials, results, self.projector, self.allocation)
        if trial.source is None and trial.loss is not None and not judgement.diverged:
            self.memory.report(trial.number, trial.rung, trial.loss)
        match judgement.verdict:
            case "complete":
                self._end(trial, "completed", judgement.reason)
            case "prune":
                self._end(trial, "pruned", judgement.reason, diverged=judgement.diverged)
            case "pause":
                self._change(trial, "paused", judgement.reason, target=trial.rung)
            case "promote":
                # Another one's turn, unless swapping costs more than it gives: a full-parameter trial's state is large.
                swaps = trial.config.method == "lora" and any(t.state == "waiting" for t in trials)
                swaps = swaps or trial.slot is None  # its worker died before this was decided
                state, turn = ("waiting", records.next_turn(trials)) if swaps else ("live", trial.turn)
                self._change(trial, state, f"promoted: {judgement.reason}", target=trial.rung + 1, turn=turn)

    def _change(self, trial: TrialRow, state: str, reason: str, **values: int) -> None:
        telling.change(self.store, self.name, trial, state, reason, **values)

    def _end(self, trial: TrialRow, state: str, reason: str, *, diverged: bool = False) -> None:
        self._change(trial, state, reason, diverged=int(diverged))

    def _tell_ended(self) -> None:
        telling.tell_ended(self.store, self.name, self.memory, self._trials()[0])

    # Project

    def _project(self) -> None:
        trials, results = self._trials()
        money = self._funds(trials, results)
        for trial, reason in triage.triage(money, trials, results, self.projector):
            best = rungs.leader(trials, results)
            if best is not None and best.number == trial.number and rungs.worth_finishing(trial, trials, results):
                # More money would go to this one first, so it keeps its place instead of being told as pruned.
                self._change(trial, "paused", f"parked: {reason}")
            else:
                self._end(trial, "pruned", reason)
        if any(trial.state in records.RUNNING for trial in self._now().confirmations):
            race, left = self._race()
            for trial in race.overdrawn(left):
                self._change(trial, "paused", "parked: not all that run can be paid to their end")

    def _race(self) -> tuple[Race, float]:
        """The race, and the seconds that are left for it."""
        race = self._now().race(self.study, self.projector)
        return race, race.left(self._funds([], self._now().results), self._lengths)

    def _funds(self, trials: list[TrialRow], results: Results) -> Funds:
        return triage.with_finish(self.workers.funds(self._worker()), trials, results, self.projector)

    # Fill

    def _fill(self) -> bool:
        """Fills the live set: thaw a promoted trial, else ask Optuna. False: there was no time for all of it."""
        if self._stopping or self.interrupted:
            return True
        while True:
            trials, results = self._trials()
            if sum(t.state in records.RUNNING for t in trials) >= self._now().live:
                return True
            ended = not self._search(trials, results)
            if ended and not (not self._now().anybody_runs and self._begin_endgame()) and not self._confirm():
                return True
            if (worker := self._worker()) is not None:
                self._seat(filled=False)
                if self.workers.pressed(worker, self._lengths, self._gap_ms):
                    self._again = True
                    return False

    def _search(self, trials: list[TrialRow], results: Results) -> bool:
        """Whether the search goes on by one more step."""
        if self._enough() is not None:
            return False
        search = self.study.spec.search
        order: list[Method | None] = [None]
        if turns.balanced(search):
            money = self._funds(trials, results)
            order = [*turns.order(search, trials, self._now().evaluations, self.projector, money)]
            if turns.crowded(search, trials, order[0]):
                return False
            order = [method for method in order if not turns.crowded(search, trials, method)]
            order += [] if self._now().anybody_runs else [None]  # one of them can do nothing: the other has its share
        return any(self._more(trials, results, method) for method in order) or self._finish(trials, results)

    def _more(self, trials: list[TrialRow], results: Results, method: Method | None) -> bool:
        """Wakes or asks for a trial of a method, of any where it is None."""
        known = turns.among(trials, results, method)
        newcomers = feasibility.newcomers(self.study, trials, method)
        return self._wake(*known, newcomers) or self._ask(trials, results, method, newcomers) or self._wake(*known, [])

    def _begin_endgame(self) -> bool:
        """When the search has no more to spend, the reserve goes to the best that is left; False if it began before."""
        enough, spent = self._enough(), self._funds([], self._now().results).spent_now
        with self.store.write() as connection:
            begun = endgame.begin(connection, self.study, enough, spent)
            self.study = self.workers.study = records.own_study(connection, self.name, self.study.fence)
        self._lengths = self.workers.lengths(self._gap_ms)  # a confirmation's end takes longer
        self._again = self._again or begun
        return begun

    def _confirm(self) -> bool:
        """Lets the next runs of the endgame begin; False if none is left that can be paid and is worth it."""
        if self.study.phase != "endgame" or not self.study.spec.endgame.trains:
            return False
        race, left = self._race()
        begun = finale.go_on(self.store, race, left, alone=not self._now().anybody_runs)
        if not (begun or self._said or self._now().anybody_runs):
            finale.say_end(self.store, race, left)
            self._said = True
        return begun

    def _seat(self, *, filled: bool) -> None:
        """Gives free slots to those who wait longest and tells the worker, before anything slower is done."""
        trials, worker = self._everyone(), self._worker()
        alone = self._alone = self._suspects() if self._alone else set()  # they come by a crash alone
        waiting = [t for t in trials if t.state in {"waiting", "live"} and t.slot is None]
        waiting.sort(key=lambda t: (t.number in alone, t.turn))
        if self._stopping or self.interrupted:
            waiting = []
        if worker is None and waiting:
            self._launch()
        elif worker is not None and worker.state == "ready":
            for trial in waiting:
                if not seats.free(worker, trial, trials, alone):
                    break  # nobody overtakes: one of another method would wait for ever that all slots are empty
                with self.store.write() as connection:
                    seats.take(connection, self.name, worker, trial)
                trials = self._everyone()
        self._instruct(filled)

    def _launch(self) -> None:
        try:
            self.workers.launch(before_start=lambda: self._let_go(stop=False))
        except BudgetError:
            with self.store.read() as connection:
                if not records.workers(connection, self.name):
                    raise  # the very first slice does not fit the cap: nothing was held
            self._park()
            self._stopping = not self._begin_endgame()

    def _wake(self, trials: list[TrialRow], results: Results, newcomers: list[TrialRow]) -> bool:
        """Thaws the trial that has earned it; without `newcomers`, instead of a new one that can't be asked."""
        if self.study.phase != "search":
            return False
        trial = self.allocation.thaw(trials, results, self.projector, newcomers)
        return trial is not None and self._promote(trial, *self._trials(), "promoted")

    def _finish(self, trials: list[TrialRow], results: Results) -> bool:
        """When no new trial can be paid, the rest of the money finishes the paused ones that may still win.

        The best go first, as many as share the machine.
        """
        confirms = self.study.phase == "endgame" and self.study.spec.endgame.trains
        if self._now().anybody_runs or (confirms and any(t.state == "completed" for t in trials)):
            return False  # with one at its end, what is left is for confirmation
        promoted: list[TrialRow] = []
        reason = "promoted: the best that is left"
        for trial in turns.last_chances(self.study.spec.search, trials, results):
            together = all(t.config.method == trial.config.method == "lora" for t in promoted)
            if together and self._promote(trial, self._trials()[0], results, reason, last=True):
                promoted.append(trial)
            if len(promoted) == self._now().slots:
                break
        return bool(promoted)

    def _promote(
        self, trial: TrialRow, trials: list[TrialRow], results: Results, reason: str, *, last: bool = False
    ) -> bool:
        target = min(max(trial.target, trial.rung + 1), self.projector.plan.last)
        woken = replace(trial, state="waiting", target=target)
        if paid := self._affordable(woken, trials, results, last=last):
            self._change(woken, "waiting", reason, target=woken.target, turn=records.next_turn(trials))
        return paid

    def _affordable(self, trial: TrialRow, trials: list[TrialRow], results: Results, *, last: bool = False) -> bool:
        """Whether a trial that joins can reach its end although all others reach their next decision before it."""
        joined = [*(t for t in trials if t.number != trial.number), trial]
        money = self._funds(joined, results)
        paid = triage.affordable(trial, joined, money, self.projector)
        return paid or (last and triage.last_chance(trial, joined, results, money, self.projector, begun=False))

    def _ask(self, trials: list[TrialRow], results: Results, method: Method | None, newcomers: list[TrialRow]) -> bool:
        """Asks for a new trial; True if there is one more to consider."""
        search, examples, seed = self.study.spec.search, self.projector.plan.examples, self.study.spec.seed
        # If not even the cheapest configuration can be paid, nothing is asked; nor until what was refused could be.
        fresh = [one for one in newcomers if self._affordable(triage.refused(trials, one), trials, results)]
        if not fresh:
            return False
        number = len(trials)
        method = fresh[0].config.method if len(fresh) == 1 else method
        model = partial(self.allocation.propose, *turns.among(trials, results, method), self.projector, fresh)
        suggest = partial(space.suggest, search=search)
        _, chosen = self.memory.ask(number, suggest, *feasibility.view(trials), model, method)
        config = space.config(number, chosen, search, examples, seed)
        hopeless = feasibility.refusal(config, trials)
        affordable = self._affordable(records.newcomer(config), trials, results)
        with self.store.write() as connection:
            records.add_trial(connection, self.name, config, records.next_turn(trials))
            records.note(connection, self.name, "asked", f"trial {number}: {space.describe(config)}", number)
        if hopeless:
            self._end(records.newcomer(config), "failed", hopeless)
        elif not affordable:
            reason = triage.not_started(self._funds(trials, results), records.newcomer(config), self.projector)
            self._end(records.newcomer(config), "pruned", reason)
        return True

    # Instruct

    def _instruct(self, filled: bool) -> None:
        worker = self._worker()
        if worker is None:
            return
        self._stop_if_done(worker, self._everyone(), filled)
        if worker.state == "ready" and not self._stopping:
            now, paid = self._now(), self.workers.slice(worker, self._lengths)
            self.instructor.instruct(self.study, worker, now.everyone, paid, examined=now.examined)

    # Stop

    def _search_is_over(self, worker: WorkerRow) -> bool:
        """Ends a search whose last slice is used up while its worker lives: the endgame would have to load another."""
        keeps = self.study.spec.endgame.trains or self.study.spec.budget.reserve
        over = self.study.phase == "search" and keeps and self.workers.used_up(worker, self._lengths)
        if not over or self.interrupted:
            return False
        self._judge()  # who came to its end is not parked
        self._park()  # before the phase is another: a kill in between would let them train on for the race's money
        return self._begin_endgame()

    def _stop_if_done(self, worker: WorkerRow, trials: list[TrialRow], filled: bool) -> None:
        # Only after a look whether somebody else may begin: after a crash the slots may be free, and nobody was asked.
        idle = filled and not any(t.state in records.RUNNING or t.slot == worker.id for t in trials)
        # On recorded timings no clock ends the final slice, so we do.
        used_up = self.study.timings is not None and self.workers.used_up(worker, self._lengths)
        if self._stopping or not (self.interrupted or idle or used_up):
            return
        if used_up and self._search_is_over(worker):
            return
        within_ms = max(STOP_MS, self._lengths.tail)
        if self.launcher.send(Path(worker.folder), Stop(fence=self.study.fence, within_ms=within_ms)):
            self._stopping = True

    def _enough(self) -> str | None:
        return stopping.enough(self.study, self._now(), self.projector)

    def _over(self) -> bool:
        if self._worker() is not None:
            return False
        return self._stopping or self.interrupted or not (self._now().anybody_runs or self._again)

    def _park(self) -> None:
        """What still waits when the study ends keeps its checkpoint and its claim to the next rung."""
        for trial in self._everyone():
            if trial.state in records.RUNNING and not self.interrupted and not self._disk_message:
                self._change(trial, "paused", "parked: the cap was reached")

    # What the steps share

    def _now(self) -> Current:
        if self._current is None or self._current.writes != self.store.writes:
            self._current = current.read(self.store, self.study, self._policy)
            slots, everyone = self._current.slots, self._current.everyone
            self.projector.width, self.projector.batch = seats.width(slots, everyone), seats.batch(everyone)
        return self._current

    def _worker(self) -> WorkerRow | None:
        return self._now().worker

    def _trials(self) -> tuple[list[TrialRow], Results]:
        """The search: confirmations are compared with nobody, and the sampler is never told of them."""
        return self._now().trials, self._now().results

    def _everyone(self) -> list[TrialRow]:
        return self._now().everyone
