"""The sampler's memory: the only file that imports Optuna.

Our tables are the truth; everything here can be replayed. A paused trial stays RUNNING in Optuna's storage, because a
trial that was told is final, while the sampler is shown it as PRUNED at its last rung: TPE's constant liar would count
a RUNNING trial among the bad ones. A diverged trial is shown PRUNED without values; told as FAIL it would be ignored
and the sampler would walk into the same region again. One that ran out of memory violates a constraint besides, which
puts it behind all that were feasible. Samplers that look at COMPLETE trials alone (all but TPE) are shown both as
COMPLETE, with the loss of the last rung, or with the worst of all, and no constraint: GP wants all trials to have it.

Any Optuna sampler can be asked; `PriorSampler` stands before it and lets the priors (sweep/proposals.py) speak first.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import optuna
from optuna._transform import _SearchSpaceTransform
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, RandomSampler, TPESampler
from optuna.storages import RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import OperationalError

from sweep import plugins, space
from sweep.errors import SpecError, StoreFullError, StoreUnavailableError
from sweep.proposals import MODELLED, Guide, Proposal
from sweep.spec import Method, SearchSpec
from sweep.store import FREE_SPACE, Store, begin_immediate, is_full

optuna.logging.set_verbosity(optuna.logging.WARNING)

NEEDS = {"gp": ("scipy", "torch"), "cmaes": ("cmaes",)}  # packages that Optuna wants for a sampler
UNGUIDED = 10  # trials drawn at random before a model of them is asked, where no priors choose them: Optuna's number
Model = Callable[[], dict[str, Any]]  # proposes a whole configuration by Optuna's names
METHOD = "method"  # the parameter that all others depend on
SOURCE = "source"  # the trial attribute that says who proposed it


class _ViewedStudy(optuna.Study):
    """A study whose sampler sees trials as `view` shows them. Samplers read through the private `_get_trials`."""

    view: Callable[[list[FrozenTrial]], list[FrozenTrial]] | None = None

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        trials = super()._get_trials(deepcopy=False, states=None, use_cache=use_cache)
        shown = self.view(trials) if self.view else trials
        return [trial for trial in shown if states is None or trial.state in states]


class _OwnStorage(_CachedStorage):
    """Optuna's cache, which reads again what was written and nothing else: nobody else writes a study that we drive.

    Optuna's own reads every unfinished trial before each question, since others might train it. Paused trials are
    unfinished in its tables, so a question took 176 ms at 100 of them.
    """

    def __init__(self, backend: RDBStorage) -> None:
        super().__init__(backend)
        self._complete = False  # whether everything was read once

    def _read_trials_from_remote_storage(self, study_id: int) -> None:
        known = self._studies.get(study_id)
        if self._complete and known is not None and not known.unfinished_trial_ids:
            return
        super()._read_trials_from_remote_storage(study_id)
        known = self._studies[study_id]
        known.unfinished_trial_ids.clear()  # which are the ones to read again
        known.last_finished_trial_id = max((trial._trial_id for trial in known.trials.values()), default=-1)
        self._complete = True

    def _written(self, trial_id: int) -> None:
        study_id, _ = self._trial_id_to_study_id_and_number[trial_id]
        self._studies[study_id].unfinished_trial_ids.add(trial_id)

    def set_trial_param(self, trial_id: int, *rest: Any) -> None:
        self._written(trial_id)
        super().set_trial_param(trial_id, *rest)

    def set_trial_state_values(self, trial_id: int, *rest: Any, **named: Any) -> bool:
        self._written(trial_id)
        return super().set_trial_state_values(trial_id, *rest, **named)

    def set_trial_intermediate_value(self, trial_id: int, *rest: Any) -> None:
        self._written(trial_id)
        super().set_trial_intermediate_value(trial_id, *rest)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._written(trial_id)
        super().set_trial_user_attr(trial_id, key, value)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        self._written(trial_id)
        super().set_trial_system_attr(trial_id, key, value)


@contextlib.contextmanager
def _reachable() -> Iterator[None]:
    """Optuna's words for a database that is out of reach, or full, become ours."""
    try:
        yield
    except (optuna.exceptions.StorageInternalError, OperationalError) as error:
        cause = error.__cause__ or error
        reason = str(getattr(cause, "orig", None) or cause).strip().splitlines()[0]
        if isinstance(cause, OperationalError) and is_full(cause):
            raise StoreFullError(f"the sampler's tables: {reason}", FREE_SPACE) from error
        raise StoreUnavailableError(f"the sampler's tables: {reason}", "try again; nothing was lost") from error


class Memory:
    """One Optuna study, driven by ask and tell."""

    def __init__(self, store: Store, name: str, seed: int, sampler: str = "tpe", guide: Guide | None = None) -> None:
        """Opens the study, or makes it. Raises StoreUnavailableError, like every method here, and SpecError."""
        # Optuna makes its tables without looking whether somebody else is making them too.
        with _reachable(), store.alone("optuna's tables"):
            rdb = RDBStorage(store.optuna_url)
            if store.is_sqlite:
                # Optuna builds its engine itself; without these its read-then-write transactions collide with ours.
                begin_immediate(rdb.engine)
                rdb.engine.dispose()
            self._storage = _OwnStorage(rdb)
            self._rdb = rdb
            self._seed = seed
            self._kind = sampler
            self._guide = guide
            # The name is the key: this is how Optuna's own load_if_exists works.
            with contextlib.suppress(optuna.exceptions.DuplicatedStudyError):
                self._storage.create_new_study([optuna.study.StudyDirection.MINIMIZE], name)
            self._study = _ViewedStudy(name, self._storage)
            self._study.get_trials(deepcopy=False)  # all of it is read once

    def ask(
        self,
        expected: int,
        suggest: Callable[[Trial], dict[str, Any]],
        paused: Mapping[int, int],
        diverged: Container[int],
        infeasible: Container[int] = (),
        model: Model | None = None,
        method: Method | None = None,
    ) -> tuple[int, dict[str, Any]]:
        """Asks for the trial number `expected` and returns it with its parameters, one of `method` where it is given.

        A trial that was asked just before a crash, so that nobody knows it, is adopted. `paused` maps trial numbers to
        their last rung. `infeasible` ones ran out of memory. `model` is who answers where the sampler is `curves`. The
        sampler's randomness comes from (study seed, number)
        alone.
        """
        with _reachable():
            return self._ask(expected, suggest, paused, diverged, infeasible, model, method)

    def _ask(
        self,
        expected: int,
        suggest: Callable[[Trial], dict[str, Any]],
        paused: Mapping[int, int],
        diverged: Container[int],
        infeasible: Container[int],
        model: Model | None,
        method: Method | None,
    ) -> tuple[int, dict[str, Any]]:
        self._study.view = lambda trials: shown(trials, paused, diverged, infeasible, self._kind)
        self._study.sampler = sampler_for(self._kind, self._seed, expected, self._guide, model, method)
        known = self._study.get_trials(deepcopy=False)
        trial = self._adopt(known[expected]) if len(known) > expected else self._study.ask()
        if trial.number != expected:
            raise RuntimeError(f"Optuna asked trial {trial.number}, the study is at {expected}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return trial.number, suggest(trial)

    def _adopt(self, known: FrozenTrial) -> Trial:
        """A trial that was asked just before a crash, perhaps half-way.

        Its parameters are drawn anew, all of them: each draw takes its share of the sampler's randomness, so whoever
        drew only the missing ones would draw others.
        """
        trial = Trial(self._study, known._trial_id)
        trial._cached_frozen_trial = copy.deepcopy(trial._cached_frozen_trial)
        trial._cached_frozen_trial.params = {}
        trial._cached_frozen_trial.distributions = {}
        return trial

    def report(self, number: int, rung: int, loss: float) -> None:
        """Notes a loss at a rung. The step is the rung's index: TPE orders by it. Repeatable."""
        with _reachable():
            if not self._state(number).is_finished() and math.isfinite(loss):
                self._storage.set_trial_intermediate_value(self._id(number), rung, loss)

    def tell(self, number: int, state: str, value: float | None, labels: Mapping[str, str | float]) -> None:
        """Ends a trial: `completed` with its value, `pruned`, or `failed`. Safe to repeat."""
        end = {"completed": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}[state]
        with _reachable():
            if self._state(number).is_finished():
                return
            for key, label in labels.items():
                self._storage.set_trial_user_attr(self._id(number), key, label)
            self._study.tell(number, value if end is TrialState.COMPLETE else None, state=end, skip_if_finished=True)

    def close(self) -> None:
        """Closes the database connections."""
        self._storage.remove_session()
        self._rdb.engine.dispose()

    def _id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)

    def _state(self, number: int) -> TrialState:
        # Not through the study, whose view calls a paused trial PRUNED.
        return self._storage.get_all_trials(self._study._study_id, deepcopy=False)[number].state


class _CmaEs(CmaEsSampler):
    """CMA-ES whose state is computed again from its trials. Optuna keeps it as a pickle, and we load none."""

    _space: Mapping[str, BaseDistribution] = {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self._space = search_space
        return super().sample_relative(study, trial, search_space)

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> Any:
        transform = _SearchSpaceTransform(dict(self._space), transform_step=True, transform_0_1=True)
        optimizer: Any = self._init_optimizer(transform, optuna.study.StudyDirection.MINIMIZE)
        while True:
            mine = [t for t in completed_trials if self._space.keys() <= t.params.keys()]
            generation = self._get_solution_trials(mine, optimizer.generation)[: optimizer.population_size]
            if len(generation) < optimizer.population_size:
                return optimizer
            inside = [{name: trial.params[name] for name in self._space} for trial in generation]
            values = [trial.value for trial in generation]
            optimizer.tell([(transform.transform(p), value) for p, value in zip(inside, values, strict=True)])

    def _split_optimizer_str(self, optimizer_str: str) -> dict[str, str]:
        return {}


class PriorSampler(BaseSampler):
    """Asks the guide first and, where that has no configuration of its own, the model of curves or the inner sampler.

    Either may be missing. With `method` the answer is of that method, whoever gives it.
    """

    def __init__(
        self,
        inner: BaseSampler,
        guide: Guide | None,
        number: int,
        model: Model | None = None,
        method: Method | None = None,
    ) -> None:
        self._inner = inner
        self._guide = guide
        self._number = number
        self._model = model
        self._method = method
        self._proposal: Proposal | None = None

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """The inner sampler's space, or none where the guide chooses."""
        return {} if self._chosen(study, trial) else self._inner.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """What the inner sampler draws together."""
        if self._chosen(study, trial):
            return {}
        drawn = self._inner.sample_relative(study, trial, search_space)
        return drawn | {METHOD: self._method} if self._method is not None and METHOD in drawn else drawn

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """One parameter: the guide's, else the inner sampler's."""
        chosen = self._chosen(study, trial)
        if param_name in chosen:
            return chosen[param_name]
        if param_name == METHOD and self._method is not None:
            return self._method
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        """Passed on."""
        self._inner.before_trial(study, trial)

    def after_trial(
        self, study: optuna.Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None
    ) -> None:
        """Passed on."""
        self._inner.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """Passed on."""
        self._inner.reseed_rng()

    def _chosen(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        """The guide's configuration by the names of the parameters; empty if it leaves the choice to the sampler."""
        if self._proposal is None:
            self._proposal = Proposal("sampler", None)
            if self._guide is not None:
                seen = self._seen(study, self._guide.search)
                self._proposal = self._guide.propose(self._number, *seen, self._method)
            if self._proposal.chosen is None and self._model is not None:
                self._proposal = Proposal("sampler", self._model())
            study._storage.set_trial_user_attr(trial._trial_id, SOURCE, self._proposal.source)
        if self._proposal.chosen is None or self._guide is None:
            return self._proposal.chosen or {}
        return space.encoded(self._proposal.chosen, self._guide.search)

    def _seen(self, study: optuna.Study, search: SearchSpec) -> tuple[list[dict[str, Any]], int]:
        """Whole configurations, the best first: by their end, then by the last rung, then those without a loss.

        The latter diverged or ran out of memory. Returned beside them is how many have a loss, be it the worst of all
        that samplers other than TPE are shown.
        """
        ended = study._get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        ranked = [
            (trial.state is TrialState.COMPLETE or trial.last_step is not None, chosen)
            for trial in sorted(ended, key=_order)
            if (chosen := space.decoded(trial.params, search)) is not None
        ]
        return [chosen for _, chosen in ranked], sum(measured for measured, _ in ranked)


def _order(trial: FrozenTrial) -> tuple[bool, int, float, int]:
    complete = trial.state is TrialState.COMPLETE
    last = trial.last_step if trial.last_step is not None else -1
    value = trial.value if complete else trial.intermediate_values.get(last)
    return not complete, -last, value if value is not None else math.inf, trial.number


def sampler_for(
    kind: str,
    seed: int,
    number: int,
    guide: Guide | None = None,
    model: Model | None = None,
    method: Method | None = None,
) -> BaseSampler:
    """Makes the sampler of one question: `curves`, `tpe`, `gp`, `random`, `cmaes` or the user's own, `module:Class`.

    Its randomness comes from (study seed, trial number) alone; a class of one's own gets it as `seed`, if it takes one.
    Raises SpecError where a package is missing.
    """
    digest = hashlib.sha256(f"{seed}:{number}".encode()).digest()
    draw = int.from_bytes(digest[:4], "big")
    missing = [package for package in NEEDS.get(kind, ()) if find_spec(package) is None]
    if missing:
        raise SpecError(f"search.sampler {kind} needs {' and '.join(missing)}", f"pip install {' '.join(missing)}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        inner = _made(kind, draw, MODELLED if guide is not None and guide.priors.guided else UNGUIDED)
    if kind == "curves":
        return PriorSampler(inner, guide, number, model, method)
    return inner if guide is None and method is None else PriorSampler(inner, guide, number, method=method)


def _made(kind: str, draw: int, start: int) -> BaseSampler:
    tpe = TPESampler(seed=draw, n_startup_trials=start, multivariate=True, group=True, constant_liar=True)
    match kind:
        case "tpe":
            return tpe
        case "random" | "curves":  # the model of curves is not Optuna's; see PriorSampler
            return RandomSampler(seed=draw)
        # What these cannot draw together, a method's own parameters or words, TPE draws one by one.
        case "gp":
            return GPSampler(
                seed=draw, n_startup_trials=start, independent_sampler=tpe, warn_independent_sampling=False
            )
        case "cmaes":
            return _CmaEs(seed=draw, independent_sampler=tpe, warn_independent_sampling=False)
    made = plugins.make(kind, "search.sampler", seed=draw)
    if not isinstance(made, BaseSampler):
        raise SpecError(
            f"search.sampler: {kind} is not an Optuna sampler", "derive it from optuna.samplers.BaseSampler"
        )
    return made


def check_sampler(search: SearchSpec) -> None:
    """Makes the study's sampler once, before anything is paid. Raises SpecError."""
    sampler_for(search.sampler, 0, 0)


def shown(
    trials: Sequence[FrozenTrial],
    paused: Mapping[int, int],
    diverged: Container[int],
    infeasible: Container[int],
    kind: str,
) -> list[FrozenTrial]:
    """Trials as a sampler is to see them: TPE knows what PRUNED means, as the guide before it does; all others are
    shown COMPLETE trials instead."""
    hidden = {trial.number for trial in trials if trial.number in diverged or trial.number in infeasible}
    pruned = [_shown(trial, paused, hidden) for trial in trials]
    if kind in {"tpe", "curves"}:
        for trial in pruned:
            if trial.number in infeasible:
                trial.set_constraint("memory", 1.0)  # over zero is violated
        return pruned
    values = [_last_value(trial) for trial in pruned]
    worst = max((value for value in values if value is not None), default=None)
    return [
        trial if trial.state is not TrialState.PRUNED else _completed(trial, worst if trial.number in hidden else value)
        for trial, value in zip(pruned, values, strict=True)
    ]


def _last_value(trial: FrozenTrial) -> float | None:
    if trial.state is TrialState.COMPLETE:
        return trial.value
    last = trial.last_step if trial.state is TrialState.PRUNED else None
    return None if last is None else trial.intermediate_values[last]


def _completed(trial: FrozenTrial, value: float | None) -> FrozenTrial:
    if value is None:
        return trial
    done = copy.copy(trial)
    done.state, done.value, done.datetime_complete = TrialState.COMPLETE, value, trial.datetime_start
    return done


def _shown(trial: FrozenTrial, paused: Mapping[int, int], hidden: Container[int]) -> FrozenTrial:
    if trial.number not in hidden and trial.number not in paused:
        return trial
    known = {} if trial.number in hidden else trial.intermediate_values
    return FrozenTrial(
        number=trial.number,
        state=TrialState.PRUNED,
        value=None,
        datetime_start=trial.datetime_start,
        datetime_complete=trial.datetime_start,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs=trial.user_attrs,
        system_attrs=dict(trial.system_attrs),
        intermediate_values={step: loss for step, loss in known.items() if step <= paused[trial.number]},
        trial_id=trial._trial_id,
    )
