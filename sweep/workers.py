"""A worker's life as the ledger sees it: paid for, launched, renewed, seen out; and found again after a crash.

intended ──launch──> started ──ready event──> ready ──> ended
   └── fenced off before it started: its hold is void
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, select

from budgets.ledger import IDLE, Ledger
from budgets.money import usd
from budgets.schema import hold
from budgets.tariff import Tariff
from sweep import blame, pricing, records, seats, slices, space, tables, triage
from sweep.apply import apply, end_attempt, rewind
from sweep.audit import remember
from sweep.errors import InvariantError, WorkerError
from sweep.fit import full_training
from sweep.launchers.base import Launcher, LaunchError
from sweep.projection import Projector
from sweep.records import Study, WorkerRow
from sweep.slices import Lengths
from sweep.store import Store
from sweep.triage import Funds
from trainers.messages import Slice, UsageRecord, WorkerJob

TOLD_MS = 2000  # before its last slice is used up a worker hears that the search is over, and three steps more
# Without a report for so long (or three tails, or six usual gaps) the next slice is not paid. A first step may compile
# for minutes, but more than a slice is not bet on it.
SILENCE_MS, LONG_SILENCE_MS = 15_000, 120_000
DEATH_SECONDS = 30.0  # how long a fenced worker may take to die before it is killed by hand
HEARTBEAT_MS = 1_000  # between two records of the watchdog
DYING_MS = 250  # a worker outlives its watchdog by less: the kernel ends it (76 ms was the worst of 25)
WAIT_MS = 5_000  # between two workers of one run; what is longer was a suspension, or a lock that somebody held
LOOK_MS = 1_000  # a death that is found so soon after the last sign of life was seen as it happened


class Workers:
    """Starts, pays for and buries the workers of one study."""

    def __init__(self, store: Store, study: Study, launcher: Launcher, projector: Projector) -> None:
        self.store = store
        self.study = study
        self.launcher = launcher
        self.projector = projector
        self._paid_until: int | None = None  # the machine's clock up to which this run's last worker was charged
        self._rounded_ms = 0  # of it, what lies beyond the worker's end
        self._seen_ms: int | None = None  # the machine's clock when the worker was last seen alive

    def lengths(self, gap_ms: int = 0) -> Lengths:
        """The lengths of paid time, from the forecasts as they stand; a slice outlasts three times the gap."""
        search = self.study.spec.search
        with self.store.read() as connection:
            cap = Ledger(connection, self.study.name).balances().cap
            slots = seats.slots(self.study, records.workers(connection, self.study.name))
        saved = {m: self.projector.checkpoint(m).mean * (slots if m == "lora" else 1) for m in search.method}
        load = self.projector.load()
        confirms = self.study.phase == "endgame" and self.study.spec.endgame.trains
        measured = self.projector.forecast.measured("load") > 0
        own = slices.slice_ms(cap, self.study.tariff.ceiling, max(saved.values()), self._longest_step(slots))
        return Lengths(
            load=round(1000 * (1.5 * load.mean if measured else 3 * load.mean)),
            expected_load=round(1000 * load.mean),
            slice=max(own, min(3 * gap_ms, slices.MAX_SLICE_MS)),
            tail=slices.tail_ms(self.projector.tail(search.method, slots, confirms=confirms).high),
        )

    def now_ms(self, worker: WorkerRow) -> int:
        """The worker's meter now; with recorded timings, its last report."""
        if self.study.timings is not None:
            return worker.at_ms
        return max(self.launcher.boot()[1] - worker.origin_boot_ms, worker.at_ms)

    def slice(self, worker: WorkerRow, lengths: Lengths) -> Slice:
        """What a worker is told of the time that is paid for."""
        return Slice(
            fence=self.study.fence,
            paid_ms=worker.paid_ms,
            work_ms=worker.work_ms,
            checkpoint_ms=lengths.slice,
        )

    def funds(self, worker: WorkerRow | None) -> Funds:
        """The study's money now; of the leader's way to its end it knows nothing."""
        with self.store.read() as connection:
            balances = Ledger(connection, self.study.name).balances()
        now, load = self.now_ms(worker) if worker else 0, self.projector.load().mean
        following = self._start(*self.launcher.boot())[1] if worker is None else None
        return triage.funds(balances, self.study.micros_per_hour, worker, now, load, following)

    def launch(self, before_start: Callable[[], None]) -> None:
        """Pays for a worker and starts it; `before_start` is called in between.

        Raises BudgetError, InvariantError, WorkerError.
        """
        lengths = self.lengths()
        on_clock, until = self.study.timings is None, self._paid_until
        if on_clock and until is not None and self.launcher.boot()[1] - until > WAIT_MS:
            self._skip_silence()
        with self.store.write() as connection:
            boot_id, now = self.launcher.boot()  # not before: the database may have been locked for half a minute
            # Its price may have changed.
            self.study = records.own_study(connection, self.study.name, self.study.fence)
            origin, tariff = self._start(boot_id, now)
            ordinal = len(records.workers(connection, self.study.name)) + 1
            identifier = f"{self.study.name}:w{ordinal:03d}"
            folder = Path(self.study.folder) / "workers" / f"{ordinal:03d}"
            work, paid, final = slices.open_slice(connection, self.study, identifier, tariff, lengths)
            connection.execute(
                tables.worker.insert().values(
                    id=identifier,
                    study=self.study.name,
                    ordinal=ordinal,
                    state="intended",
                    folder=str(folder),
                    hold=slices.hold_id(identifier, 1),
                    slice=1,
                    final=int(final),
                    micros_per_hour=tariff.now,
                    tariff=tariff.dumps(),
                    origin_boot_ms=origin,
                    boot_id=boot_id,
                    paid_ms=paid,
                    work_ms=work,
                )
            )
            records.note(connection, self.study.name, "launch", f"worker {ordinal} starts")
        worker = self._row(identifier)
        before_start()
        try:
            self.launcher.start(self._job(worker, lengths), folder)
        except LaunchError as error:
            self._seen_ms = self.launcher.boot()[1]  # whatever came to life did so while we waited for it
            if not self.launcher.fence_off(folder):
                self.launcher.stop(folder)  # it came to life after all, too late
            self.see_dead(worker)
            self.bury(self.drain(worker))
            raise WorkerError(str(error), f"see {folder / 'watchdog.log'}") from error
        self._seen_ms = self.launcher.boot()[1]
        with self.store.write() as connection:
            records.set_worker(connection, identifier, state="started")

    def _start(self, boot_id: str, now: int) -> tuple[int, Tariff]:
        """Where a new worker's meter starts on the machine's clock, and what it is paid by.

        The machine's time since this run's last worker is paid for by the next one, unless it is so long that the next
        one's first slice, which is paid for a load, might be over before it starts. Where the last one, of this run or
        of one before, was charged beyond now, to a full quantum, the next one has so much time for nothing.
        """
        study, until = self.study, self._paid_until
        if study.timings is not None:  # their meters and the machine's clock have nothing to do with one another
            return now, study.tariff if until is None else study.tariff.following(self._rounded_ms)
        if until is None and study.boot_id == boot_id and study.last_boot_ms is not None and study.last_boot_ms > now:
            until = study.last_boot_ms
        if until is None or now - until > WAIT_MS:
            return now, study.tariff
        return min(until, now), study.tariff.following(max(until - now, 0))

    def renewal_due(self, worker: WorkerRow, lengths: Lengths, gap_ms: int) -> bool:
        """Whether the next slice should be paid now; `gap_ms` is the longest recent silence between two reports."""
        now = self.now_ms(worker)
        loading = lengths.load if worker.state != "ready" else 0
        patience = max(SILENCE_MS, min(lengths.slice, LONG_SILENCE_MS), 3 * lengths.tail, 6 * gap_ms, loading)
        if now - worker.at_ms > patience:
            return False  # alive is not enough: a hung worker's time is not paid on
        # What is held for the worker's end was a first guess, and much of it is known not to be needed: it may train.
        if worker.paid_ms - lengths.tail - worker.work_ms >= lengths.slice // 2:
            return True
        # Early enough that the worker, which ends before a step that would pass work_ms, never has to.
        return not worker.final and worker.work_ms - now < lengths.slice * 2 // 3

    def used_up(self, worker: WorkerRow, lengths: Lengths) -> bool:
        """Whether a worker's last slice is used up: on a clock before it is, since the worker then ends by itself."""
        if self.study.timings is not None:
            return bool(worker.final) and worker.at_ms >= worker.work_ms
        if not worker.final or worker.state != "ready":
            return False
        # The worker ends before a step that would pass its time, and has to be told before that.
        margin_ms = min(lengths.slice // 3, TOLD_MS + round(3000 * self._longest_step(worker.slots.get("lora", 1))))
        return self.now_ms(worker) >= worker.work_ms - margin_ms

    def pressed(self, worker: WorkerRow, lengths: Lengths, gap_ms: int) -> bool:
        """Whether the worker has said something, or its next slice is due: the sampler's questions can wait."""
        if self.launcher.read_events(Path(worker.folder), worker.offset):
            return True
        return self.renewal_due(worker, lengths, gap_ms)

    def renew(self, worker: WorkerRow, lengths: Lengths) -> WorkerRow:
        """Settles the open slice and pays for the next; returns the worker's new row."""
        with self.store.write() as connection:
            slices.renew(connection, self.study, worker, self.now_ms(worker), lengths)
        self._remember()
        return self._row(worker.id)

    def _remember(self) -> None:
        with self.store.read() as connection:
            remember(connection, self.study)

    def follow_price(self, worker: WorkerRow | None, lengths: Lengths) -> bool:
        """Puts the study, and its living worker, under a price that was changed since the last look; False: it is the
        same."""
        with self.store.read() as connection:
            micros, ceiling, boot_id, boot_ms = pricing.newest(connection, self.study.name)
        known = [self.study.tariff, *([worker.tariff] if worker else [])]
        if not micros or all((tariff.now, tariff.ceiling) == (micros, ceiling) for tariff in known):
            return False
        with self.store.write() as connection:
            self.study = records.own_study(connection, self.study.name, self.study.fence)
            if worker is not None:
                self.reprice(connection, worker, lengths, said_at=(boot_id, boot_ms))
        return True

    def reprice(self, connection: Connection, worker: WorkerRow, lengths: Lengths, *, said_at: tuple[str, int]) -> None:
        """Puts a living worker under the study's new price, said at (boot id, ms since boot)."""
        boot_id, boot_ms = said_at
        now = self.now_ms(worker)
        # The clock is one machine's own: it dates the change only for a worker on the machine where it was said.
        same = boot_id == worker.boot_id and self.study.timings is None
        said = boot_ms - worker.origin_boot_ms if same else now
        price = self.study.tariff
        tariff = worker.tariff.changed(min(max(said, worker.settled_ms), now), price.now, price.ceiling)
        slices.change_price(connection, self.study, worker, tariff, now, lengths)

    def alive(self, worker: WorkerRow) -> bool:
        """Whether a worker's watchdog lives; when it was last seen to is remembered, for `bury`."""
        looked_ms = self.launcher.boot()[1]  # before the look: we may be stopped in between
        if alive := self.launcher.alive(Path(worker.folder)):
            self._seen_ms = looked_ms
        return alive

    def bury(self, worker: WorkerRow) -> None:
        """Settles a worker that is dead and gives its trials back to the queue.

        Charged is what the watchdog recorded. Without its last record: up to now if the worker was seen alive just
        before, else up to the last heartbeat and the time that may have passed since, and without any record the whole
        hold. A worker that provably never started costs nothing.
        """
        record = self.launcher.read_usage(Path(worker.folder))
        with self.store.write() as connection:
            rest = self._rest(connection, worker)
            if record is None and self._never_started(worker):
                Ledger(connection, self.study.name).void(worker.hold, fence=self.study.fence)
                ended_ms, how = 0, "never started"
            elif record is None and not self._observed(worker):
                ended_ms, how = worker.paid_ms, "no record of its end: its slice is charged in full"
                slices.expire(connection, self.study, worker, rest, how)
                self._charged_until(connection, worker, ended_ms, ended_ms)
            else:
                ended_ms, how = self._end(worker, record)
                billed_ms = slices.settle_end(connection, self.study, worker, ended_ms, rest, how)
                self._charged_until(connection, worker, ended_ms, billed_ms)
            self._lose_trials(connection, worker, crash=blame.crashed(record))
            values: dict[str, Any] = {"state": "ended", "why": worker.why or how}
            values["exit_code"] = record.exit_code if record else None
            records.set_worker(connection, worker.id, **values)
            cost = usd(Ledger(connection, self.study.name).balances().spent)
            text = f"worker {worker.ordinal} ended after {ended_ms / 1000:.1f} s ({how}); spent {cost}"
            records.note(connection, self.study.name, "ended", text)
        self._seen_ms = None
        self._remember()

    def _never_started(self, worker: WorkerRow) -> bool:
        """Whether it is certain that the worker never ran: it was not launched yet, and no trace says otherwise.

        A folder that is not there proves it only where the launch would have made it: on this boot of this machine.
        """
        folder = Path(worker.folder)
        here = worker.boot_id == self.launcher.boot()[0] or (folder / "job.json").exists()
        return worker.state == "intended" and here and not (folder / "watchdog.json").exists()

    def _charged_until(self, connection: Connection, worker: WorkerRow, ended_ms: int, billed_ms: int) -> None:
        self._paid_until = worker.origin_boot_ms + billed_ms
        self._rounded_ms = billed_ms - ended_ms
        records.set_study(connection, self.study.name, last_boot_ms=self._paid_until, boot_id=worker.boot_id)

    def _seen_on_meter(self, worker: WorkerRow) -> int | None:
        """The worker's meter when it was last seen alive; None if nobody looked."""
        if self._seen_ms is None:
            return None
        return worker.at_ms if self.study.timings is not None else self._seen_ms - worker.origin_boot_ms

    def _observed(self, worker: WorkerRow) -> bool:
        """Whether a worker's death was seen just as it happened."""
        seen_ms = self._seen_on_meter(worker)
        return seen_ms is not None and self.now_ms(worker) - seen_ms <= LOOK_MS

    def _end(self, worker: WorkerRow, record: UsageRecord | None) -> tuple[int, str]:
        """When a dead worker ended on its meter, as far as is known, and how."""
        if record is not None and record.ended:
            return max(record.ms, worker.at_ms), record.why
        if record is None or self._observed(worker):
            return self.now_ms(worker), "lost its watchdog"
        margin = 0 if self.study.timings else HEARTBEAT_MS + DYING_MS
        # We may have been stopped since we looked: what it can have lived beyond that the heartbeats say.
        known_ms = max(worker.at_ms, self._seen_on_meter(worker) or 0)
        ended_ms = max(min(record.ms + margin, worker.paid_ms), known_ms)
        return ended_ms, "no record of its end: charged up to a heartbeat after its last one"

    def recover(self) -> None:
        """Takes over what an earlier orchestrator left: reattaches to a living worker, settles a dead one."""
        with self.store.read() as connection:
            living = records.workers(connection, self.study.name, living=True)
        for worker in living:
            folder, self._seen_ms = Path(worker.folder), None
            if not self.launcher.fence_off(folder):
                self._seen_ms = self.launcher.boot()[1]
                with self.store.write() as connection:
                    if worker.state == "intended":
                        records.set_worker(connection, worker.id, state="started")
                    records.note(connection, self.study.name, "reattach", f"worker {worker.ordinal} lives; reattached")
                continue
            self.see_dead(worker)
            self.bury(self._follow_past_prices(self.drain(worker)))
        with self.store.read() as connection:
            alone = not records.workers(connection, self.study.name, living=True)
        self._skip_silence(charge=alone)
        self._refund_on_evidence()

    def _skip_silence(self, *, charge: bool = True) -> None:
        """What the machine did since the last worker is no worker's of this run: we did not run, or were suspended."""
        self._paid_until = None
        with self.store.read() as connection:
            self.study = records.own_study(connection, self.study.name, self.study.fence)
        if charge:
            self._charge_gap()

    def _follow_past_prices(self, worker: WorkerRow) -> WorkerRow:
        """Puts a dead worker under the prices that were said while it lived and nobody drove it; returns its row.

        Those that were said on its own machine's boot alone: another clock does not date them.
        """
        if self.study.timings is not None:
            return worker
        record = self.launcher.read_usage(Path(worker.folder))
        ended_ms = worker.paid_ms if record is None else self._end(worker, record)[0]
        lengths = self.lengths()
        with self.store.write() as connection:
            for micros, ceiling, boot_id, boot_ms in pricing.history(connection, self.study.name):
                said_ms = boot_ms - worker.origin_boot_ms
                if boot_id == worker.boot_id and worker.settled_ms <= said_ms < ended_ms:
                    tariff = worker.tariff.changed(said_ms, micros, ceiling)
                    slices.change_price(connection, self.study, worker, tariff, ended_ms, lengths)
                    worker = replace(worker, tariff=tariff)
        return self._row(worker.id)

    def see_dead(self, worker: WorkerRow) -> None:
        """Waits until a worker whose watchdog is gone is dead too: never two at once. Raises WorkerError."""
        folder = Path(worker.folder)
        lived = self.launcher.worker_alive(folder)
        self.launcher.wait_dead(folder, DEATH_SECONDS)
        self.launcher.stop(folder)
        if not self.launcher.wait_dead(folder, DEATH_SECONDS):
            raise WorkerError(f"worker {worker.ordinal} does not die", f"see {folder / 'watchdog.json'}")
        if lived:  # it outlived its watchdog and died while we looked
            self._seen_ms = self.launcher.boot()[1]

    def drain(self, worker: WorkerRow) -> WorkerRow:
        """Applies every event that a dead worker left."""
        for offset, event in self.launcher.read_events(Path(worker.folder), worker.offset):
            with self.store.write() as connection:
                apply(connection, self.study, worker, event, offset)
        return self._row(worker.id)

    def _longest_step(self, slots: int) -> float:
        """Seconds of the longest stretch without a look at the clock: a step of the largest batch, or an evaluation.

        In a pack every trial takes its step before anybody looks.
        """
        search, plan = self.study.spec.search, self.projector.plan
        tokens = max(search.batch_size) * plan.run_tokens // plan.examples
        configs = [space.typical(m, search, plan.examples, self.study.spec.seed) for m in search.method]
        steps = [
            self.projector.train(config, tokens * at_once, at_once).mean
            for config in configs
            for at_once in [slots if config.method == "lora" else 1]
        ]
        return max(*steps, *(self.projector.evaluation(m, plan.rung_tokens).mean for m in search.method))

    def _row(self, identifier: str) -> WorkerRow:
        with self.store.read() as connection:
            return next(w for w in records.workers(connection, self.study.name) if w.id == identifier)

    def _job(self, worker: WorkerRow, lengths: Lengths) -> WorkerJob:
        spec = self.study.spec
        return WorkerJob(
            worker=worker.id,
            command=self.launcher.worker_command(Path(worker.folder)),
            model=spec.model,
            data=str(Path(self.study.folder) / "data"),
            rung_rows=self.projector.plan.rung_rows,
            origin_boot_ms=worker.origin_boot_ms,
            boot_id=worker.boot_id,
            fence=self.study.fence,
            paid_ms=worker.paid_ms,
            work_ms=worker.work_ms,
            checkpoint_ms=lengths.slice,
            grace_ms=slices.GRACE_MS,
            device=spec.machine.device,
            threads=spec.machine.threads,
            timings=self.study.timings,
            heartbeat_ms=HEARTBEAT_MS,
            stop_command=spec.machine.stop_command,
            slots=None if spec.machine.slots == "auto" else spec.machine.slots,
            max_rank=max(spec.search.rank),
            precision=spec.search.precision,
            methods=list(spec.search.method),
            metric=spec.objective.metric,
            choices=None if spec.objective.choices is None else list(spec.objective.choices),
            max_new_tokens=spec.objective.max_new_tokens,
            **full_training(spec, self.study.facts),
        )

    def _rest(self, connection: Connection, worker: WorkerRow) -> list[str]:
        """Whose the time is between a worker's last report and its end."""
        if worker.state != "ready":
            return ["load"]
        alive = [t for t in records.trials(connection, self.study.name) if t.slot == worker.id and t.state == "live"]
        return [f"trial:{trial.number}" for trial in alive] or ["teardown"]

    def _refund_on_evidence(self) -> None:
        """Looks once more for a record of workers whose last slice was charged in full; what it disproves returns."""
        with self.store.read() as connection:
            expired = set(connection.execute(select(hold.c.id).where(hold.c.state == "expired")).scalars())
            workers = records.workers(connection, self.study.name)
            if Ledger(connection, self.study.name).reconciled():
                return  # the bill has said it already
        for worker, follower in zip(workers, [*workers, None][1:], strict=True):
            record = self.launcher.read_usage(Path(worker.folder)) if worker.hold in expired else None
            if record is None or not record.ended:
                continue
            ended_ms = record.ms
            if follower is not None and follower.tariff.paid_ms and follower.boot_id == worker.boot_id:
                ended_ms = worker.settled_ms  # the next one had the rest for nothing
            if worker.tariff.billed_ms(ended_ms) >= worker.settled_ms:
                continue
            with self.store.write() as connection:
                returned = slices.refund_expired(connection, self.study, worker, ended_ms)
                text = f"worker {worker.ordinal} left a record after all: {usd(returned)} return"
                records.note(connection, self.study.name, "refund", text)

    def _lose_trials(self, connection: Connection, worker: WorkerRow, *, crash: bool) -> None:
        name = self.study.name
        lost = [trial for trial in records.trials(connection, name) if trial.slot == worker.id]
        trained = [trial for trial in lost if trial.state == "live"]
        for trial in lost:
            rewind(connection, name, trial)
            if trial.attempt:
                end_attempt(connection, trial.attempt, "crashed" if crash and trial in trained else "lost")
        if crash:
            blame.judge(connection, name, trained, worker.why or "no word")

    def _charge_gap(self) -> None:
        """On a machine that is billed from its boot, the time between a crash and the resume is idle time, and paid."""
        study = self.study
        if study.spec.machine.billed_from != "boot" or study.last_boot_ms is None:
            return
        boot_id, now = self.launcher.boot()
        if boot_id != study.boot_id or now <= study.last_boot_ms:
            return  # another boot: what this machine cost before the launch is not known to us
        tariff = replace(study.tariff, minimum_ms=0)
        waited = tariff.billed_ms(now - study.last_boot_ms)
        now = study.last_boot_ms + waited
        with self.store.write() as connection:
            ledger = Ledger(connection, study.name)
            note = "the machine waited for the resume"
            ledger.charge(f"{study.name}:gap:{now}", IDLE, tariff.cost(waited), note=note)
            records.set_study(connection, study.name, last_boot_ms=now)
            self._paid_until = now
            seconds = (now - study.last_boot_ms) / 1000
            records.note(connection, study.name, "gap", f"the machine waited {seconds:.0f} s for the resume: charged")
            balances = ledger.balances()
        if balances.frozen:  # committed first: lost money is never hidden
            raise InvariantError(f"the machine's wait for the resume passed the cap by {usd(balances.overrun)}")
