"""The plan: what a cap buys, before a cent is spent.

One model for `sweep plan` and for the question that `sweep launch` asks: a pure function of the resolved spec, of what
was seen of model, data and machine, and of forecasts, be they priors or taught by a probe. The search is rehearsed
(`sweep/rehearsal.py`; by ranks, also where the model of curves decides, then as one in four), the race is asked whom it
would let in (`sweep/endgame.py`).

    cap = search + confirmation + finale + overhead + left      to the micro-dollar, by cost centre as in the statement
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from budgets.forecast import NOTHING, Seconds
from budgets.money import affordable_ms, cost_micros, usd
from sweep import doubts, endgame, finale, rungs, seats, slices, space, turns
from sweep.doubts import Shortfall
from sweep.endgame import Candidate, SecondsOf
from sweep.pricing import Quote
from sweep.projection import Plan, Projector, plan, untaught
from sweep.proposals import anything
from sweep.records import Study, newcomer
from sweep.rehearsal import Costs, Rehearsed, Rules, rehearse
from sweep.spec import RESERVE_SHARE, Method, Spec
from trainers.messages import TrialConfig

METHODS: tuple[Method, ...] = ("lora", "full")
CONFIGS = 16  # that are drawn from the space to find what a trial costs on average
MARGIN = 1.2  # of the upper end of a run's forecast over its mean when the race begins: the machine is known by then
FACTORS = (0.5, 2.0)  # of the cap, whose plans are compared with this one's


@dataclass(frozen=True)
class Whole:
    """One run of a method to its end, alone on the machine: micro-dollars with their 80 % interval."""

    method: Method
    searched: bool
    cost: int
    low: int
    high: int
    affordable: float  # how many of these the cap would pay for, one after the other


@dataclass(frozen=True)
class Rung:
    """A length at which trials are compared, or their end."""

    tokens: int
    share: float  # of the longest run
    trials: float  # that come to it
    cost: int  # micro-dollars of the stretches that end there


@dataclass(frozen=True)
class Phase:
    """A part of the cap: micro-dollars, seconds of the machine, and how many runs it pays for, where it is for runs."""

    name: str  # search, confirmation, finale, overhead, left
    cost: int
    seconds: float
    runs: float | None = None


@dataclass(frozen=True)
class Confirmation:
    """What the reserve confirms: so many of the wanted configurations, each over so many seeds."""

    configurations: int
    seeds: int
    wanted_configurations: int
    wanted_seeds: int
    needed: int  # micro-dollars in reserve that confirm the best of each method over all seeds, and pay for the finale
    needed_all: int  # the same for all wanted configurations


@dataclass(frozen=True)
class Other:
    """What another cap would buy."""

    factor: float
    cap: int
    trials: float
    completed: float
    confirmed: int  # configurations
    seeds: int
    seconds: float


@dataclass(frozen=True)
class Outline:
    """What `plan` shows, and `launch` before it asks. Amounts are micro-dollars."""

    cap: int
    reserve: int
    micros_per_hour: int
    unit: str
    minimum_seconds: float  # the least that the provider bills, and what it rounds up to
    quantum_seconds: float
    seconds: float  # of machine time that the cap pays for
    plan: Plan
    first_rung: int  # to bring one LoRA (or else full) trial to its first decision
    runs: list[Whole]
    trials: float  # that the search trains
    trials_low: float  # at the upper and at the lower end of what a run may cost
    trials_high: float
    rungs: list[Rung]
    phases: list[Phase]
    confirmation: Confirmation | None
    shortfalls: list[Shortfall]
    others: list[Other]
    probe_seconds: float | None  # how long the machine was measured; None: all of this is from priors

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)

    def phase(self, name: str) -> Phase:
        """The phase of that name."""
        return next(phase for phase in self.phases if phase.name == name)


@dataclass
class Probed:
    """What a probe measured: the forecasts that learned it, and how many LoRA trials train at once."""

    projector: Projector
    slots: int | None = None
    seconds: float = 0.0  # that it took
    notes: list[str] = field(default_factory=list)


def prospective(spec: Spec, facts: dict[str, Any], quote: Quote) -> Study:
    """The study as it would be if it were launched."""
    return Study(
        name=spec.study,
        spec=spec,
        facts=facts,
        state="open",
        fence=0,
        folder="",
        micros_per_hour=quote.tariff.now,
        tariff=quote.tariff,
        unit=quote.unit,
        phase="search",
        base_loss=None,
        base_rung_loss=None,
        created_unix_ms=0,
        outcome="",
        last_boot_ms=None,
        boot_id=None,
    )


def cheapest_run(spec: Spec, facts: dict[str, Any], quote: Quote) -> int:
    """Micro-dollars of one whole run of the cheapest searched method, from priors."""
    study = prospective(spec, facts, quote)
    forecasts = _Forecasts(study, untaught(study), seats.slots(study, []))
    return max(min(forecasts.whole(method).cost for method in spec.search.method), 1)


def outline(
    spec: Spec,
    facts: dict[str, Any],
    quote: Quote,
    probed: Probed | None = None,
    others: Sequence[Outline] = (),
) -> Outline:
    """Plans a study. Where nothing was `probed`, forecasts are priors, and their intervals wide.

    `others` are plans for other caps to compare with.
    """
    study = prospective(spec, facts, quote)
    known = untaught(study) if probed is None else probed.projector.of(plan(facts))
    slots = None if probed is None else probed.slots
    forecasts = _Forecasts(study, known, slots or seats.slots(study, []))
    runs = [forecasts.whole(method) for method in METHODS]
    search, overhead = forecasts.search(1.0), forecasts.start()
    endgame_seconds = forecasts.seconds_of(spec.budget.reserve) + max(search.left, 0.0)
    last = forecasts.finale()
    race = forecasts.race(search, endgame_seconds - last.mean)
    confirmation = None if race is None else forecasts.confirmation(race, last)
    phases = forecasts.phases(search, overhead, race, last)
    searched = [run for run in runs if run.searched]
    spread = fmean(run.high / run.cost for run in searched)
    return Outline(
        cap=spec.budget.cap,
        reserve=spec.budget.reserve,
        micros_per_hour=quote.tariff.now,
        unit=quote.unit,
        minimum_seconds=quote.tariff.minimum_ms / 1000,
        quantum_seconds=quote.tariff.quantum_ms / 1000,
        seconds=forecasts.seconds_of(spec.budget.cap),
        plan=known.plan,
        first_rung=min(forecasts.price(forecasts.costs[method].alone[0]) for method in spec.search.method),
        runs=runs,
        trials=search.started,
        trials_low=forecasts.search(spread).started,
        trials_high=forecasts.search(1 / spread).started,
        rungs=forecasts.rungs(search),
        phases=phases,
        confirmation=confirmation,
        shortfalls=[
            *_shortfalls(spec, searched, search, confirmation, forecasts.price(last.mean)),
            *doubts.of_data(spec, study.facts["data"]),
        ],
        others=[_other(one, spec.budget.cap) for one in others],
        probe_seconds=None if probed is None else probed.seconds,
    )


def _shortfalls(
    spec: Spec, searched: Sequence[Whole], search: Rehearsed, confirmed: Confirmation | None, last: int
) -> list[Shortfall]:
    """What the money does not reach for: whole runs, a finished search, the confirmation, the finale."""
    found = []
    if all(run.affordable < 1 for run in searched):
        cheapest = min(run.cost for run in searched)
        remedy = f"a whole run is forecast at {usd(cheapest)}: shorten search.epochs, or raise budget.cap"
        found.append(Shortfall("the cap pays for no whole run", remedy))
    elif search.arrived[-1] < 1:
        remedy = "lower budget.reserve, shorten search.epochs, or raise budget.cap"
        found.append(Shortfall("the search's money brings no trial to its end", remedy))
    if confirmed is None:
        if last > spec.budget.reserve:
            what = f"the reserve of {usd(spec.budget.reserve)} does not pay for the finale"
            found.append(Shortfall(what, _more(spec, last, spec.budget.cap)))
    elif confirmed.needed > spec.budget.reserve or confirmed.seeds < confirmed.wanted_seeds:
        best = "the best configuration" if len(spec.search.method) == 1 else "the best configuration of each method"
        also = " and the finale take" if last else " takes"
        what = f"{best} over {_seeds(confirmed.wanted_seeds)}{also} {usd(confirmed.needed)}"
        reached = _words(confirmed.configurations, confirmed.seeds)
        what += f", the reserve is {usd(spec.budget.reserve)}: with what the search leaves, {reached} confirmed"
        found.append(Shortfall(what, _more(spec, confirmed.needed, spec.budget.cap)))
    return found


def _words(configurations: int, seeds: int) -> str:
    if not configurations:
        return "nothing is"
    count = f"{configurations} configuration{'s' if configurations > 1 else ''} over {_seeds(seeds)}"
    return count + (" are" if configurations > 1 else " is")


def _seeds(count: int) -> str:
    return f"{count} seed{'s' if count > 1 else ''}"


def _more(spec: Spec, needed: int, cap: int) -> str:
    """How a reserve becomes so large: out of the cap, or with a larger one."""
    ways = [f"budget.reserve: {usd(_rounded(needed))}"]
    if needed > cap / 2:  # the search needs the larger part
        ways = [f"{ways[0]} and a cap of {usd(_rounded(needed / RESERVE_SHARE))}"]
    if spec.endgame.seeds > 1:
        ways.append("fewer endgame.seeds")
    if spec.endgame.seeds:
        ways.append("endgame: {seeds: 0}, which leaves everything to the search")
    return "it would fit with " + ", or ".join(ways)


def _rounded(micros: float) -> int:
    """Up, to two digits: a forecast has no more."""
    step = int(10 ** max(math.floor(math.log10(max(micros, 1))) - 1, 0))
    return math.ceil(micros / step) * step


def _other(one: Outline, cap: int) -> Other:
    confirmed = one.confirmation
    return Other(
        factor=one.cap / cap,
        cap=one.cap,
        trials=one.trials,
        completed=one.rungs[-1].trials,
        confirmed=0 if confirmed is None else confirmed.configurations,
        seeds=0 if confirmed is None else confirmed.seeds,
        seconds=sum(phase.seconds for phase in one.phases if phase.name != "left"),
    )


@dataclass(frozen=True)
class _Race:
    """Who is let in over how many seeds, and the forecast of their runs in seconds; of each run, its checkpoint too."""

    entered: list[Candidate]
    seeds: int
    wanted: list[Candidate]
    seconds: float
    beside: float
    before: float  # the untrained model's examination, and what a slice's tail keeps back


class _Forecasts:
    """A prospective study's forecasts in seconds, and what they make in dollars."""

    def __init__(self, study: Study, projector: Projector, slots: int) -> None:
        self.study, self.spec, self.projector = study, study.spec, projector
        self.slots = slots
        self._first = self.spec.search.method[0]  # whose engine judges the untrained model
        self.configs = {method: drawn_configs(self.spec, method, projector.plan.examples) for method in METHODS}
        self.costs = {method: self._costs(method) for method in METHODS}

    def price(self, seconds: float) -> int:
        """Micro-dollars of so much machine time."""
        return cost_micros(self.study.tariff.now, round(1000 * seconds))

    def seconds_of(self, micros: int) -> float:
        """Machine time that so many micro-dollars pay for."""
        return affordable_ms(self.study.tariff.now, micros) / 1000

    def whole(self, method: Method) -> Whole:
        """One run of a typical configuration, as the loop forecasts it before it asks for one."""
        config = space.typical(method, self.spec.search, self.projector.plan.examples, self.spec.seed)
        seconds = self.projector.train(config, self.projector.plan.run_tokens)
        cost = max(self.price(seconds.mean), 1)  # of a model so small that a run rounds to nothing
        searched = method in self.spec.search.method
        return Whole(
            method, searched, cost, self.price(seconds.low), self.price(seconds.high), self.spec.budget.cap / cost
        )

    def _costs(self, method: Method) -> Costs:
        plan, known, configs = self.projector.plan, self.projector, self.configs[method]
        ends = [*plan.rungs, plan.run_tokens]
        lengths = [end - start for start, end in zip([0, *plan.rungs], ends, strict=True)]
        seen = [known.evaluation(method, plan.rung_tokens).mean] * plan.last
        seen.append(known.evaluation(method, plan.validation_tokens).mean + known.examined(method, confirms=False).mean)

        def stretches(width: float) -> tuple[float, ...]:
            trained = [fmean(known.train(config, tokens, width).mean for config in configs) for tokens in lengths]
            return tuple(train + evaluate for train, evaluate in zip(trained, seen, strict=True))

        kept = [known.kept(method, number == plan.last).mean for number in range(plan.last + 1)]
        last_rung = dataclasses.replace(newcomer(configs[0]), tokens=plan.rungs[-1] if plan.rungs else plan.run_tokens)
        return Costs(
            packed=stretches(self.slots if method == "lora" else 1),
            alone=stretches(1),
            kept=tuple(kept),
            park=known.checkpoint(method).mean if method == "full" else 0.0,
            restore=known.restore(method).mean,
            parks=method == "lora" or known.parking_pays(last_rung),
        )

    def start(self) -> float:
        """Seconds until a worker can train, the untrained model's loss, and the worker's end."""
        base = self.projector.evaluation(self._first, self.projector.plan.validation_tokens).mean
        return self.projector.load().mean + base + slices.EXIT_MS / 1000

    def search(self, slower: float) -> Rehearsed:
        """The search rehearsed, on a machine that is so many times slower than forecast."""
        search, plan = self.spec.search, self.projector.plan
        seconds = self.seconds_of(self.spec.budget.cap - self.spec.budget.reserve) - self.start()
        live = seats.places(self.slots, search.live)
        eta = rungs.expected(plan.shares) if search.promote == "curves" else search.eta
        even = turns.balanced(search)
        rules = Rules(live, self.slots, eta, rungs.policy(search, plan.shares), search.trials, even)
        return rehearse([self.costs[method] for method in search.method], max(seconds, 0.0) / slower, rules)

    def rungs(self, search: Rehearsed) -> list[Rung]:
        """What comes to each rung, and what it costs on the way there."""
        plan = self.projector.plan
        return [
            Rung(tokens, tokens / plan.run_tokens, trials, self.price(seconds))
            for tokens, trials, seconds in zip(
                [*plan.rungs, plan.run_tokens], search.arrived, search.spent, strict=True
            )
        ]

    def race(self, search: Rehearsed, seconds: float) -> _Race | None:
        """Whom the race would let in after a search, with so many seconds; of a search that tried anything, enough."""
        wanted = self._candidates()
        if not wanted:
            return None
        if not search.started:
            return _Race([], 0, wanted, 0.0, 0.0, self._before())
        before = self._before()
        seats_of = self._seats()
        entered, seeds = endgame.entered(wanted, {}, self._upper, seconds - before, seats_of, self.spec.endgame.seeds)
        missing = _runs(entered, seeds)
        expected = endgame.seconds_for(missing, self._expected, seats_of)
        beside = sum(self.projector.kept(one.method, True).mean for one, _ in missing)
        return _Race(entered, seeds, wanted, max(expected - beside, 0.0), beside, before)

    def confirmation(self, race: _Race, last: Seconds) -> Confirmation:
        """What is confirmed, and what it would take to confirm more."""
        seeds = self.spec.endgame.seeds
        firsts = [one for one in race.wanted if one.place == 1]

        def needed(group: Sequence[Candidate]) -> int:
            together = endgame.seconds_for(_runs(group, seeds), self._upper, self._seats())
            return self.price(together + race.before + MARGIN * last.mean)

        return Confirmation(
            configurations=len(race.entered),
            seeds=race.seeds,
            wanted_configurations=len(race.wanted),
            wanted_seeds=seeds,
            needed=needed(firsts),
            needed_all=needed(race.wanted),
        )

    def finale(self) -> Seconds:
        """The winner trained in full, from the reserve; nothing where the spec has no finale.

        Whose it will be is not known, so the dearest searched method's counts.
        """
        each = finale.finale_cost(self.spec, self.study.facts, self.projector).values()
        return max(each, key=lambda seconds: seconds.mean, default=NOTHING)

    def phases(self, search: Rehearsed, start: float, race: _Race | None, last: Seconds) -> list[Phase]:
        """The cap's parts by cost centre; what remains is left."""
        beside = start + search.beside + (0.0 if race is None else race.beside)
        beside += self.projector.examined(self._first, confirms=True).mean if race is not None and race.entered else 0.0
        parts: list[tuple[str, float, float | None]] = [("search", sum(search.spent), search.started)]
        parts.append(("confirmation", race.seconds if race else 0.0, len(race.entered) * race.seeds if race else 0))
        parts += [("finale", last.mean, float(last.mean > 0)), ("overhead", beside, None)]
        left, found = self.spec.budget.cap, []
        for name, seconds, count in parts:
            cost = min(self.price(seconds), left)
            left -= cost
            found.append(Phase(name, cost, seconds, count))
        return [*found, Phase("left", left, self.seconds_of(left))]

    def _candidates(self) -> list[Candidate]:
        """The configurations that the spec wants confirmed; `endgame.ranks` adds the best of each LoRA rank."""
        settings = self.spec.endgame
        if not settings.seeds:
            return []
        found: list[Candidate] = []
        for method in self.spec.search.method:
            count = settings.configurations
            if settings.ranks and method == "lora":
                count = max(count, len(self.spec.search.rank))
            found += [Candidate(len(found) + n, method, n + 1) for n in range(count)]
        return found

    def _before(self) -> float:
        """What the race keeps back: see endgame.Race.left."""
        known, methods = self.projector, self.spec.search.method
        tail = slices.tail_ms(MARGIN * known.tail(methods, self.slots, confirms=True).mean) / 1000
        return MARGIN * known.examined(self._first, confirms=True).mean + max(tail - known.ending(methods).mean, 0.0)

    def _seats(self) -> Mapping[Method, int]:
        return {"lora": self.slots, "full": 1}

    def _run(self, candidate: Candidate, ordinal: int, width: int) -> Seconds:
        configs = self.configs[candidate.method]
        source = newcomer(configs[candidate.number % len(configs)])
        config = endgame.confirmation(source, ordinal, self.spec.seed)
        return self.projector.confirmation(newcomer(config), width)

    @property
    def _upper(self) -> SecondsOf:
        return lambda candidate, ordinal, width: MARGIN * self._run(candidate, ordinal, width).mean

    @property
    def _expected(self) -> SecondsOf:
        return lambda candidate, ordinal, width: self._run(candidate, ordinal, width).mean


def _runs(group: Sequence[Candidate], seeds: int) -> list[tuple[Candidate, int]]:
    return [(one, ordinal) for one in group for ordinal in range(1, seeds + 1)]


def drawn_configs(spec: Spec, method: Method, examples: int) -> list[TrialConfig]:
    """Configurations of a method, as a search without any knowledge would draw them."""
    search, draw = spec.search.model_copy(update={"method": (method,)}), random.Random(spec.seed)
    return [space.config(number, anything(search, draw), search, examples, spec.seed) for number in range(CONFIGS)]
