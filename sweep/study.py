"""The sampler's memory: the only file that imports Optuna.

Our tables are the truth; everything here can be replayed. A paused trial stays RUNNING in Optuna's storage, because a
trial that was told is final, while the sampler is shown it as PRUNED at its last rung: TPE's constant liar would count
a RUNNING trial among the bad ones. A diverged trial is shown PRUNED without values; told as FAIL it would be ignored
and the sampler would walk into the same region again. One that ran out of memory violates a constraint besides, which
puts it behind all that were feasible.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import math
import warnings
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import optuna
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage, get_storage
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import OperationalError

from sweep.errors import StoreUnavailableError
from sweep.store import Store, begin_immediate

optuna.logging.set_verbosity(optuna.logging.WARNING)


class _ViewedStudy(optuna.Study):
    """A study whose sampler sees trials as `view` shows them. Samplers read through the private `_get_trials`."""

    view: Callable[[list[FrozenTrial]], list[FrozenTrial]] | None = None

    def _get_trials(
        self, deepcopy: bool = True, states: Container[TrialState] | None = None, use_cache: bool = False
    ) -> list[FrozenTrial]:
        trials = super()._get_trials(deepcopy=False, states=None, use_cache=use_cache)
        shown = self.view(trials) if self.view else trials
        return [trial for trial in shown if states is None or trial.state in states]


@contextlib.contextmanager
def _reachable() -> Iterator[None]:
    """Optuna's words for a database that is out of reach become ours."""
    try:
        yield
    except (optuna.exceptions.StorageInternalError, OperationalError) as error:
        cause = error.__cause__ or error
        reason = str(getattr(cause, "orig", None) or cause).strip().splitlines()[0]
        raise StoreUnavailableError(f"the sampler's tables: {reason}", "try again; nothing was lost") from error


class Memory:
    """One Optuna study, driven by ask and tell."""

    def __init__(self, store: Store, name: str, seed: int) -> None:
        """Opens the study, or makes it. Raises StoreUnavailableError, like every method here."""
        # Optuna makes its tables without looking whether somebody else is making them too.
        with _reachable(), store.alone("optuna's tables"):
            rdb = RDBStorage(store.optuna_url)
            if store.is_sqlite:
                # Optuna builds its engine itself; without these its read-then-write transactions collide with ours.
                begin_immediate(rdb.engine)
                rdb.engine.dispose()
            self._storage = get_storage(rdb)
            self._rdb = rdb
            self._seed = seed
            # The name is the key: this is how Optuna's own load_if_exists works.
            with contextlib.suppress(optuna.exceptions.DuplicatedStudyError):
                self._storage.create_new_study([optuna.study.StudyDirection.MINIMIZE], name)
            self._study = _ViewedStudy(name, self._storage)

    def ask(
        self,
        expected: int,
        suggest: Callable[[Trial], dict[str, Any]],
        paused: Mapping[int, int],
        diverged: Container[int],
        infeasible: Container[int] = (),
    ) -> tuple[int, dict[str, Any]]:
        """Asks for the trial number `expected` and returns it with its parameters.

        A trial that was asked just before a crash, so that nobody knows it, is adopted. `paused` maps trial numbers to
        their last rung. `infeasible` ones ran out of memory. The sampler's randomness comes from (study seed, number)
        alone.
        """
        with _reachable():
            return self._ask(expected, suggest, paused, diverged, infeasible)

    def _ask(
        self,
        expected: int,
        suggest: Callable[[Trial], dict[str, Any]],
        paused: Mapping[int, int],
        diverged: Container[int],
        infeasible: Container[int],
    ) -> tuple[int, dict[str, Any]]:
        self._study.view = lambda trials: [_shown(t, paused, diverged, infeasible) for t in trials]
        self._study.sampler = self._sampler(expected)
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
        return self._storage.get_trial(self._id(number)).state

    def _sampler(self, number: int) -> TPESampler:
        digest = hashlib.sha256(f"{self._seed}:{number}".encode()).digest()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return TPESampler(seed=int.from_bytes(digest[:4], "big"), multivariate=True, group=True, constant_liar=True)


def _shown(
    trial: FrozenTrial, paused: Mapping[int, int], diverged: Container[int], infeasible: Container[int]
) -> FrozenTrial:
    hidden = trial.number in diverged or trial.number in infeasible
    if not hidden and trial.number not in paused:
        return trial
    values = {} if hidden else {s: v for s, v in trial.intermediate_values.items() if s <= paused[trial.number]}
    shown = FrozenTrial(
        number=trial.number,
        state=TrialState.PRUNED,
        value=None,
        datetime_start=trial.datetime_start,
        datetime_complete=trial.datetime_start,
        params=trial.params,
        distributions=trial.distributions,
        user_attrs=trial.user_attrs,
        system_attrs=dict(trial.system_attrs),
        intermediate_values=values,
        trial_id=trial._trial_id,
    )
    if trial.number in infeasible:
        shown.set_constraint("memory", 1.0)  # over zero is violated
    return shown
