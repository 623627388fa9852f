"""The endgame: the leading configurations are trained again under other seeds, so that a lucky run does not win.

The search cannot touch the reserve; when it has nothing more to spend, the reserve is released. Then configurations
race (`next_runs`, a pure function): each run of the race repeats a trial of the search from scratch to its end under a
new seed, the same seeds for every configuration, so that two are compared by paired differences over common seeds.
Who is clearly behind the best of its method leaves, and what that saves goes to those that can't be told apart (racing:
Maron and Moore, "Hoeffding Races", 1994). Runs are judged on the validation rows; the test rows never choose.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from sqlalchemy import Connection, select

from budgets.ledger import Ledger
from budgets.money import affordable_ms, usd
from sweep import feasibility, records, space, tables
from sweep.projection import Projector
from sweep.records import Study, TrialRow
from sweep.slices import Lengths
from sweep.store import Store
from sweep.triage import Funds
from sweep.verdict import by_common_seeds
from trainers.messages import Method, TrialConfig

SEED_STEP = 1_000_003  # between the seeds of a study's race: studies whose seeds are neighbours share none
ONE_SEED = 0.05  # with one common seed only this relative difference is clear: seeds alone make 1 to 3 %
FURTHER = 2  # times endgame.seeds are given to leaders that can't be told apart
# One-sided 90 % quantiles of Student's t by degrees of freedom, from 1; the last one stands for more, where it is a
# little too careful.
T90 = (3.078, 1.886, 1.638, 1.533, 1.476, 1.440, 1.415, 1.397, 1.383, 1.372)


# The race. Nothing from here to `winner` knows tables.


@dataclass(frozen=True)
class Candidate:
    """A configuration that the search found. Candidates are passed around with the best of the search first."""

    number: int  # of its trial in the search
    method: Method
    place: int  # among its method's, as the search ranks them, from 1
    representative: bool = False  # the best of its LoRA rank, that ranks are compared by


Run = tuple[int, int]  # a candidate's number, and which of the new seeds, from 1
# What was measured, lower is better: infinite where the run failed, None while it is under way.
Runs = Mapping[Run, float | None]
SecondsOf = Callable[[Candidate, int, int], float]  # of a candidate's run number n, among so many that train at once


def next_runs(
    candidates: Sequence[Candidate],
    runs: Runs,
    seconds_of: SecondsOf,
    seconds_left: float,
    seats: Mapping[Method, int],
    seeds: int,
) -> list[Run]:
    """Returns the runs that begin now, [] where all seats are taken or nothing more is worth its price or payable.

    `seconds_left` is what can be paid beyond the runs under way, `seats` how many of a method train at once; one method
    trains at a time. A round is one seed for everybody who is still in the race, and seats that a round leaves empty
    are given to the next one. Further seeds for two leaders that can't be told apart come when everybody has theirs.
    """
    methods = {c.number: c.method for c in candidates}
    under_way = [methods[number] for (number, _), value in runs.items() if value is None and number in methods]
    racing, least = entered(candidates, runs, seconds_of, seconds_left, seats, seeds)
    wanted = [(c, n) for n in range(1, least + 1) for c in racing if (c.number, n) not in runs]
    further = not wanted and not under_way
    if further:
        wanted = _further(racing, runs, seeds)
    if not wanted:
        return []
    method = under_way[0] if under_way else wanted[0][0].method
    free = seats.get(method, 1) - len(under_way)
    chosen: list[tuple[Candidate, int]] = []
    for one in [one for one in wanted if one[0].method == method][: max(free, 0)]:
        width = len(under_way) + len(chosen) + 1
        if sum(seconds_of(c, n, width) for c, n in [*chosen, one]) > seconds_left:
            break
        chosen.append(one)
    if further and seconds_for(wanted, seconds_of, seats) > seconds_left:
        return []  # a further seed of one leader says nothing without the other's
    return [(c.number, n) for c, n in chosen]


def entered(
    candidates: Sequence[Candidate],
    runs: Runs,
    seconds_of: SecondsOf,
    seconds_left: float,
    seats: Mapping[Method, int],
    seeds: int,
) -> tuple[list[Candidate], int]:
    """Returns who is in the race, and over how many seeds each of them can be confirmed.

    At first the best of each method and who has begun; where that can be paid in full, the others too, one of each
    method after the other, as many as can be paid. Where it can't, over fewer seeds, but two tell more than one: the
    best method alone over two seeds comes before all of them over one.
    """
    racing = [c for c in candidates if not _out(c, candidates, runs, seeds)]
    firsts = list({c.method: c for c in reversed(racing)}.values())
    firsts.sort(key=racing.index)
    begun = {number for number, _ in runs}
    together = [c for c in racing if c in firsts or c.number in begun]

    def payable(group: Sequence[Candidate], least: int) -> bool:
        missing = [(c, n) for c in group for n in range(1, least + 1) if (c.number, n) not in runs]
        return seconds_for(missing, seconds_of, seats) <= seconds_left

    groups = [together, firsts, *([one] for one in firsts)]
    counts = [*range(seeds, 1, -1)]
    tries = [(group, count) for group in groups for count in counts] + [(group, 1) for group in groups]
    found = next(((group, count) for group, count in tries if group and payable(group, count)), None)
    if found is None:
        return [], 0
    group, least = list(found[0]), found[1]
    if group != together or least < seeds:
        return group, least
    closed: set[Method] = set()
    for one in sorted((c for c in racing if c not in group), key=lambda c: c.place):
        if one.method not in closed and payable([*group, one], seeds):
            group.append(one)
        else:
            closed.add(one.method)
    return sorted(group, key=racing.index), seeds


def seconds_for(missing: Sequence[tuple[Candidate, int]], seconds_of: SecondsOf, seats: Mapping[Method, int]) -> float:
    """What runs take that share the seats of their method as evenly as they can."""
    total = 0.0
    for method in {c.method for c, _ in missing}:
        mine = [one for one in missing if one[0].method == method]
        width = len(mine) // math.ceil(len(mine) / max(seats.get(method, 1), 1))
        total += sum(seconds_of(c, n, width) for c, n in mine)
    return total


def _measured(candidate: Candidate, runs: Runs) -> dict[int, float]:
    """A candidate's finished runs by seed."""
    return {n: value for (number, n), value in runs.items() if number == candidate.number and value is not None}


def clearly_behind(mine: Mapping[int, float], others: Mapping[int, float]) -> bool:
    """Whether one with these values by seed is worse than the other beyond what seeds explain: a paired t-test at 90 %.

    With one common seed it takes a difference of 5 %. A run that failed is behind one that did not.
    """
    common = [n for n in sorted(mine.keys() & others.keys()) if math.isfinite(mine[n]) or math.isfinite(others[n])]
    differences = [mine[n] - others[n] for n in common]
    if any(math.isinf(d) for d in differences):
        return max(differences) == math.inf and min(differences) > -math.inf
    if len(differences) < 2:
        return any(d > ONE_SEED * abs(others[n]) for d, n in zip(differences, common, strict=True))
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    return mean > 0 and mean > T90[min(len(differences) - 1, len(T90)) - 1] * spread / math.sqrt(len(differences))


def _out(candidate: Candidate, candidates: Iterable[Candidate], runs: Runs, seeds: int) -> bool:
    """Whether it left the race: a run of it failed, or it is clearly behind another of its method that is left.

    One that stands for its rank has all its seeds before it can fall behind.
    """
    mine = _measured(candidate, runs)
    if not all(map(math.isfinite, mine.values())):
        return True
    if candidate.representative and len(mine) < seeds:
        return False
    others = [_measured(c, runs) for c in candidates if c.method == candidate.method and c != candidate]
    return any(clearly_behind(mine, other) for other in others if all(map(math.isfinite, other.values())))


def _ranked(candidates: Sequence[Candidate], runs: Runs) -> list[Candidate]:
    """Those with two runs and none that failed, the best first."""
    measured = {c: _measured(c, runs) for c in candidates}
    measured = {c: found for c, found in measured.items() if len(found) > 1 and all(map(math.isfinite, found.values()))}
    found = list(measured)
    return [found[place] for place in by_common_seeds(list(measured.values()))]


def _further(racing: Sequence[Candidate], runs: Runs, seeds: int) -> list[tuple[Candidate, int]]:
    """One more seed for each of the two leaders, of whatever method, while they can't be told apart."""
    leaders = _ranked(racing, runs)[:2]
    if len(leaders) < 2:
        return []
    first, second = (_measured(c, runs) for c in leaders)
    following = min(len(first), len(second)) + 1
    if clearly_behind(first, second) or clearly_behind(second, first) or following > FURTHER * seeds:
        return []
    return [(c, following) for c in leaders if (c.number, following) not in runs]


def winner(candidates: Sequence[Candidate], runs: Runs, seeds: int) -> Candidate | None:
    """The best confirmed configuration of any method, by the mean over common seeds.

    Two seeds are the least, and one that failed under any seed is not confirmed; None where no other is there.
    """
    left = [c for c in candidates if not _out(c, candidates, runs, seeds)]
    return next(iter(_ranked(left, runs)), None)


# From here on: the race as the tables have it.


def begin(connection: Connection, study: Study, stopped: str | None = None, spent: int = 0) -> bool:
    """Ends the search and releases the reserve; False if there is no endgame to begin (any more).

    From here on nobody new is asked for. A living worker's last slice is no longer its last. `stopped` says why a
    search ends that could go on (sweep/stopping.py): then the endgame has the reserve alone, beyond `spent`
    micro-dollars, and the rest of the cap is not spent.
    """
    if study.phase != "search":
        return False
    facts = records.study(connection, study.name).facts
    if stopped is not None and facts.get("stopped") != stopped:
        facts |= {"stopped": stopped, "endgame_until": spent + Ledger(connection, study.name).balances().reserve}
        records.set_study(connection, study.name, facts=facts)
        records.note(connection, study.name, "stop", f"the search has enough: {stopped}")
    freed = Ledger(connection, study.name).release(f"endgame{study.fence}", note="the search is over")
    if not freed and not study.spec.endgame.trains:
        return False
    facts["endgame_turn"] = records.next_turn(records.trials(connection, study.name))
    records.set_study(connection, study.name, phase="endgame", facts=facts)
    records.pay_on(connection, study.name)
    released = f"the reserve of {usd(freed)} is released" if freed else "nothing was in reserve"
    records.note(connection, study.name, "endgame", f"the search is over; {released}")
    return True


def value(trial: TrialRow, metric: str) -> float | None:
    """What chooses among trials that came to their end, lower is better; None where it was not measured."""
    if metric == "validation_loss":
        return trial.full_loss
    return None if trial.metric is None else -trial.metric


def candidates(study: Study, trials: Sequence[TrialRow], confirmations: Sequence[TrialRow]) -> list[Candidate]:
    """Who may enter, the best of the search first: completed ones by their value, then by rung and loss there.

    The leading ones of each method, with `endgame.ranks` the best of each LoRA rank, and whoever has begun.
    """
    settings, begun = study.spec.endgame, {trial.source for trial in confirmations}
    places: dict[Method, int] = {}
    ranks: set[int | None] = set()
    seen: set[TrialConfig] = set()
    found = []
    for trial in sorted(trials, key=lambda t: _order(t, study.spec.objective.metric)):
        config = replace(trial.config, number=0)
        usable = trial.loss is not None and not feasibility.lost(trial)
        if not usable or config in seen:  # a space of few choices is asked for the same one twice
            continue
        seen.add(config)
        method = config.method
        places[method] = places.get(method, 0) + 1
        stands = settings.ranks and method == "lora" and config.rank not in ranks
        ranks.add(config.rank)
        if places[method] <= settings.configurations or stands or trial.number in begun:
            found.append(Candidate(trial.number, method, places[method], stands))
    return found


def _order(trial: TrialRow, metric: str) -> tuple[float, float, int]:
    found = value(trial, metric) if trial.state == "completed" else None
    return (-math.inf, found, trial.number) if found is not None else (-trial.rung, trial.loss or 0.0, trial.number)


def runs_of(study: Study, confirmations: Sequence[TrialRow]) -> dict[Run, float | None]:
    """The race so far. A parked run is not among them: it is to be gone on with as one is to be begun."""
    found: dict[Run, float | None] = {}
    for trial in confirmations:
        if trial.state in records.RUNNING:
            found[trial.run] = None
        elif trial.state in records.ENDED:
            measured = value(trial, study.spec.objective.metric) if trial.state == "completed" else None
            found[trial.run] = math.inf if measured is None else measured
    return found


def confirmation(source: TrialRow, ordinal: int, study_seed: int) -> TrialConfig:
    """The configuration of a trial of the search under the study's new seed number `ordinal`, from 1."""
    number = records.confirmation_number(source.number, ordinal)
    return replace(whole(source.config), number=number, seed=(study_seed + SEED_STEP * ordinal) % 2**32)


def whole(config: TrialConfig) -> TrialConfig:
    """The configuration over the whole base: what is confirmed, and the finale, is trained in bf16."""
    return replace(config, precision="bf16")


@dataclass(frozen=True)
class Race:
    """The race of a study at one moment: what the tables say, and what things are forecast to cost."""

    study: Study
    trials: Sequence[TrialRow]  # of the search
    confirmations: Sequence[TrialRow]
    finales: Sequence[TrialRow]
    projector: Projector
    seats: Mapping[Method, int]
    examined: bool  # whether the untrained model's scores are known

    def left(self, money: Funds, lengths: Lengths) -> float:
        """Seconds that can be paid beyond the runs under way; below zero if not all of these can come to their end.

        A slice's tail can't train, but a last evaluation can be made and written in it.
        """
        ending = self.projector.ending(self.study.spec.search.method).mean
        left = min(money.left_now, self.study.facts.get("endgame_until", money.balances.cap) - money.spent_now)
        seconds = affordable_ms(money.micros_per_hour, max(left - money.overhead, 0)) / 1000
        seconds -= sum(self.projector.seconds_to_end(trial) for trial in self._under_way())
        if not self.examined:
            seconds -= self.projector.examined(self.study.spec.search.method[0], confirms=True).high
        # A spot machine's time is held at its ceiling.
        dearer = self.study.tariff.ceiling / max(money.micros_per_hour, 1)
        return seconds - max(dearer * lengths.tail / 1000 - ending, 0.0)

    def next(self, seconds_left: float) -> list[Run]:
        """The runs that begin now, or go on; [] while the search is under way, or where nothing is confirmed."""
        if not self.study.spec.endgame.seeds or any(trial.state in records.RUNNING for trial in self.trials):
            return []
        return next_runs(*self._asked(seconds_left))

    def _asked(
        self, seconds_left: float
    ) -> tuple[list[Candidate], dict[Run, float | None], SecondsOf, float, Mapping[Method, int], int]:
        found = candidates(self.study, self.trials, self.confirmations)
        runs = runs_of(self.study, self.confirmations)
        return found, runs, self._seconds_of, seconds_left, self.seats, self.study.spec.endgame.seeds

    def overdrawn(self, seconds_left: float) -> list[TrialRow]:
        """Whom to park, the last ones of the race first, so that the others come to their end.

        The last one that runs is left to the ledger: parking it would save the money for nobody.
        """
        running = sorted(self._under_way(), key=lambda t: (t.run[1], t.turn))
        parked = []
        while seconds_left < 0 and len(running) > 1:
            parked.append(running.pop())
            seconds_left += self.projector.seconds_to_end(parked[-1])
        return parked

    def shortfall(self, seconds_left: float) -> str:
        """Says which method's best could not be confirmed over all seeds; empty if each was."""
        found, runs, *_ = self._asked(seconds_left)
        seeds = self.study.spec.endgame.seeds
        words = []
        for method in self.study.spec.search.method:
            mine = [c for c in found if c.method == method and not _out(c, found, runs, seeds)]
            most = max((len(_measured(c, runs)) for c in mine), default=0)
            if not mine:
                words.append(f"no {method} trial was evaluated")
            elif most < seeds:
                needed = self._seconds_of(mine[0], most + 1, 1)
                price = usd(round(needed * self.study.micros_per_hour / 3600))
                words.append(f"{method} over {most} of {seeds} seeds, one more is forecast at {price}")
        return "; ".join(words)

    def _under_way(self) -> list[TrialRow]:
        return [t for t in [*self.confirmations, *self.finales] if t.state in {"live", "waiting"}]

    def _seconds_of(self, candidate: Candidate, ordinal: int, width: int) -> float:
        """At the upper end of the interval: a run that is parked on its way tells nothing."""
        parked = next((t for t in self.confirmations if t.run == (candidate.number, ordinal)), None)
        source = next(t for t in self.trials if t.number == candidate.number)
        config = confirmation(source, ordinal, self.study.spec.seed)
        return self.projector.confirmation(parked or records.newcomer(config), width).high


def start(store: Store, race: Race, chosen: Sequence[Run]) -> None:
    """Lets runs begin, or go on from where they were parked: rows of their own, without any rung before the end."""
    name, known = race.study.name, {trial.run: trial for trial in race.confirmations}
    first = records.next_turn([*race.trials, *race.confirmations])
    with store.write() as connection:
        for turn, run in enumerate(chosen, first):
            if run in known:
                values = {"state": "waiting", "turn": turn, "reason": "the race goes on"}
                records.set_trial(connection, name, known[run].number, **values)
                continue
            source = next(t for t in race.trials if t.number == run[0])
            words = f"repeats trial {source.number} under another seed"
            enter(connection, race, source, confirmation(source, run[1], race.study.spec.seed), turn, words)


def enter(connection: Connection, race: Race, source: TrialRow, config: TrialConfig, turn: int, words: str) -> None:
    """Adds a run of the endgame: a trial without any rung before its end. `words` say what it does."""
    more = {"source": source.number, "target": race.projector.plan.last}
    records.add_trial(connection, race.study.name, config, turn, **more)
    text = f"trial {records.label(config.number)} {words}: {space.describe(config)}"
    records.note(connection, race.study.name, "asked", text, config.number)


def say_end(connection: Connection, race: Race, seconds_left: float) -> None:
    """Notes who won the race, and who could not be confirmed."""
    won, missing = outcome(race.study, race.trials, race.confirmations), race.shortfall(seconds_left)
    if won is not None:
        text = f"trial {won.source.number} is confirmed over {len(won.runs)} seeds"
        records.note(connection, race.study.name, "confirmed", text, won.source.number)
    if missing:
        records.note(connection, race.study.name, "endgame", f"not everything is confirmed: {missing}")


def examined(connection: Connection, name: str) -> bool:
    """Whether the untrained model's scores are known."""
    mine = (tables.scores.c.study == name) & (tables.scores.c.trial == tables.UNTRAINED)
    return connection.execute(select(tables.scores.c.split).where(mine)).first() is not None


@dataclass(frozen=True)
class Outcome:
    """The winner of a race: its runs in the order of their seeds, and the one whose weights are exported."""

    source: TrialRow
    runs: list[TrialRow]
    export: TrialRow


def outcome(study: Study, trials: Sequence[TrialRow], confirmations: Sequence[TrialRow]) -> Outcome | None:
    """Who won; None where nothing was confirmed over two seeds."""
    runs = runs_of(study, confirmations)
    found = winner(candidates(study, trials, confirmations), runs, study.spec.endgame.seeds)
    if found is None:
        return None
    measured = _measured(found, runs)
    mine = {t.run[1]: t for t in confirmations if t.source == found.number}
    best = min(measured, key=lambda n: (measured[n], n))
    source = next(t for t in trials if t.number == found.number)
    return Outcome(source, [mine[n] for n in sorted(measured)], mine[best])
