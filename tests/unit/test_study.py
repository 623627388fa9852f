"""What the sampler is shown: judged by where its suggestions land."""

from __future__ import annotations

import math
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
from optuna.samplers import RandomSampler
from sqlalchemy import event

from sweep import priors, space, study
from sweep.errors import SpecError, StoreFullError, StoreUnavailableError
from sweep.proposals import Guide
from sweep.spec import RangeSpec, SearchSpec
from sweep.store import Store
from sweep.study import Memory

SEARCH = SearchSpec(
    rank=(8,), alpha=(8,), targets=("mlp",), batch_size=(8,), learning_rate=RangeSpec(low=1e-5, high=1e-1)
)
BEST = 1e-3


def ask(memory: Memory, number: int, paused: dict[int, int], diverged: set[int]) -> float:
    """Asks and returns the learning rate."""
    _, chosen = memory.ask(number, lambda trial: space.suggest(trial, SEARCH), paused, diverged)
    return float(chosen["lora_learning_rate"])


@pytest.fixture
def memory(tmp_path: Path):
    """A study of one dimension."""
    store = Store(f"sqlite:///{tmp_path}/a.db", create=True)
    opened = Memory(store, "s", 0)
    yield opened
    opened.close()
    store.dispose()


@pytest.mark.parametrize("shown", [True, False])
def test_paused_trials_teach_the_sampler(memory: Memory, shown: bool) -> None:
    """Proves the view: shown as pruned, paused trials lead to the best rate; left RUNNING they would not."""
    paused: dict[int, int] = {}
    away = []
    for number in range(32):
        rate = ask(memory, number, paused if shown else {}, set())
        memory.report(number, 0, abs(math.log10(rate / BEST)))
        paused[number] = 0
        away.append(abs(math.log10(rate / BEST)))
    late = statistics.mean(away[-12:])
    assert late < 0.7 if shown else late > 0.8, "1.0 is what guessing gives"


def test_diverged_trials_repel(memory: Memory) -> None:
    """Proves that a region where everything diverged is left alone, although nothing there has a value."""
    diverged: set[int] = set()
    late = []
    for number in range(36):
        rate = ask(memory, number, {}, diverged)
        if rate > 1e-2:
            diverged.add(number)
            memory.tell(number, "pruned", None, {})
        else:
            memory.tell(number, "completed", abs(math.log10(rate / BEST)), {})
        late.append(rate > 1e-2)
    assert sum(late[-12:]) <= 2, "guessing gives three"


def test_a_question_can_be_asked_again(tmp_path: Path) -> None:
    """Proves resume: the same number under the same history is the same question, also when it was left half asked."""
    rates = []
    for name in ("a", "b"):
        store = Store(f"sqlite:///{tmp_path}/{name}.db", create=True)
        first = Memory(store, "s", 7)
        for number in range(14):
            ask(first, number, {}, set())
            first.tell(number, "completed", 1.0 + number, {})
        if name == "b":
            first._study.ask()  # killed between the question and its parameters
            first.close()
            first = Memory(store, "s", 7)
        rates.append(ask(first, 14, {}, set()))
        first.close()
        store.dispose()
    assert rates[0] == rates[1]


class Midway(RandomSampler):
    """A user's sampler that always takes the geometric middle of a range."""

    def sample_independent(self, study: Any, trial: Any, name: str, distribution: Any) -> Any:
        """The middle of a range, chance for choices."""
        if not hasattr(distribution, "low"):
            return super().sample_independent(study, trial, name, distribution)
        return math.sqrt(distribution.low * distribution.high)


WIDE = SearchSpec(
    rank=(4, 8, 16, 32), alpha=(8, 16, 32), targets=("mlp",), batch_size=(8,),
    learning_rate=RangeSpec(low=1e-5, high=1e-1),
)  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "package", "learns"),
    [("tpe", "optuna", True), ("gp", "scipy", True), ("cmaes", "cmaes", True), ("random", "optuna", False)],
)
def test_every_sampler_learns_from_paused_trials(tmp_path: Path, kind: str, package: str, learns: bool) -> None:
    """Proves the view of each sampler by where its suggestions land: near the best rate, off the diverging ones.

    Nothing ever completes here: all that is known are paused trials at their first rung, and diverged ones.
    """
    pytest.importorskip(package)
    store = Store(f"sqlite:///{tmp_path}/a.db", create=True)
    memory = Memory(store, "s", 3, kind)
    search = WIDE.model_copy(update={"sampler": kind})
    paused: dict[int, int] = {}
    diverged: set[int] = set()
    away = []
    for number in range(44):
        _, chosen = memory.ask(number, lambda trial: space.suggest(trial, search), paused, diverged)
        rate = chosen["lora_learning_rate"]
        assert chosen["lora_rank"] in search.rank and chosen["lora_alpha"] in search.alpha
        away.append(abs(math.log10(rate / BEST)))
        if rate > 3e-2:
            diverged.add(number)
            memory.tell(number, "pruned", None, {})
        else:
            memory.report(number, 0, away[-1] + 0.1 * abs(math.log2(chosen["lora_rank"] / 16)))
            paused[number] = 0
    memory.close()
    store.dispose()
    late = statistics.mean(away[-14:])
    assert late < 0.7 if learns else late > 0.8, f"{late}: 1.0 is what guessing gives"
    assert not learns or not diverged & set(range(32, 44))


def test_a_sampler_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves module:Class: a user's sampler chooses, is found in the working directory, or refused in one line."""
    (tmp_path / "mine_17.py").write_text("from optuna.samplers import RandomSampler as Mine\nclass Broken:\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    store = Store(f"sqlite:///{tmp_path}/a.db", create=True)
    memory = Memory(store, "s", 0, f"{__name__}:Midway")
    assert ask(memory, 0, {}, set()) == pytest.approx(1e-3)
    memory.close()
    store.dispose()
    assert isinstance(study.sampler_for("mine_17:Mine", 0, 0), RandomSampler)
    for name, message in [
        ("mine_17:Broken", "is not an Optuna sampler"),
        ("mine_17:Absent", "AttributeError"),
        ("absent_17:Mine", "ModuleNotFoundError: No module named 'absent_17'"),
    ]:
        with pytest.raises(SpecError, match=f"search.sampler: {name} .*{message}") as caught:
            study.sampler_for(name, 0, 0)
        assert "\n" not in str(caught.value)


def test_a_missing_package_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a sampler whose package is not there is refused in one line that says what to install."""
    monkeypatch.setattr(study, "NEEDS", {"tpe": ("no_such_package_1", "optuna")})
    with pytest.raises(SpecError, match=r"search\.sampler tpe needs no_such_package_1") as caught:
        study.check_sampler(SearchSpec(sampler="tpe"))
    assert caught.value.hint == "pip install no_such_package_1"


def test_cmaes_keeps_no_pickle(tmp_path: Path) -> None:
    """Proves that CMA-ES leaves nothing in the database that would have to be unpickled, and still goes on from it."""
    pytest.importorskip("cmaes")
    store = Store(f"sqlite:///{tmp_path}/a.db", create=True)
    memory, search = Memory(store, "s", 3, "cmaes"), WIDE.model_copy(update={"sampler": "cmaes"})
    for number in range(24):
        _, chosen = memory.ask(number, lambda trial: space.suggest(trial, search), {}, set())
        memory.tell(number, "completed", abs(math.log10(chosen["lora_learning_rate"] / BEST)), {})
    attributes = [trial.system_attrs for trial in memory._study.get_trials()]
    memory.close()
    store.dispose()
    assert max(attrs.get("cma:generation", 0) for attrs in attributes) >= 2
    assert not any("optimizer" in key for attrs in attributes for key in attrs)


@pytest.mark.parametrize("kind", ["tpe", "random"])
def test_nothing_is_sought_near_what_did_not_fit(tmp_path: Path, kind: str) -> None:
    """Proves that configurations that all ran out of memory are no incumbents and speak against the priors; with one
    that has a loss there is an incumbent again."""
    known = priors.select(SearchSpec(), {"hidden_size": 576, "model_type": "llama"}, 2000)
    assert known is not None
    store = Store(f"sqlite:///{tmp_path}/a.db", create=True)
    led = Guide(known, SearchSpec(), 2000, 7)
    memory = Memory(store, "s", 7, kind, led)
    failed: set[int] = set()
    for number in range(30):
        memory.ask(number, lambda trial: space.suggest(trial, SearchSpec()), {}, set(), failed)
        failed.add(number)
        memory.tell(number, "failed", None, {})
    assert "incumbent" not in {trial.user_attrs["source"] for trial in memory._study.get_trials()}
    seen = [dict(chosen) for chosen in known.first]
    assert led.trust(seen, 0) < led.trust([], 0) < led.trust(seen), "the likely ones did not fit, or they did well"
    assert led.shares(seen, 0)["incumbent"] == 0 < led.shares(seen, 1)["incumbent"]
    memory.close()
    store.dispose()


@pytest.mark.parametrize("method", [("lora",), ("lora", "full")])
def test_guided_questions_can_be_asked_again(tmp_path: Path, method: tuple[str, ...]) -> None:
    """Proves crash replay with priors: killed inside any question, whatever its source, the study goes on as it would.

    The half-asked trial is left with its first parameters drawn, or with none.
    """
    search = SearchSpec.model_validate({"method": method})
    known = priors.select(search, {"hidden_size": 576, "model_type": "llama"}, 2000)
    assert known is not None
    histories, sources = [], []
    for name in ("whole", "killed"):
        store = Store(f"sqlite:///{tmp_path}/{name}.db", create=True)
        memory = Memory(store, "s", 7, "tpe", Guide(known, search, 2000, 7))
        history = []
        for number in range(24):
            if name == "killed" and number % 3 != 2:
                with pytest.raises(KeyboardInterrupt):
                    memory.ask(number, lambda trial, n=number: _killed(trial, search, n), {}, set())
                memory.close()
                memory = Memory(store, "s", 7, "tpe", Guide(known, search, 2000, 7))
            _, chosen = memory.ask(number, lambda trial: space.suggest(trial, search), {}, set())
            history.append(chosen)
            memory.tell(number, "completed", abs(math.log10(chosen[f"{chosen['method']}_learning_rate"] / BEST)), {})
        histories.append(history)
        sources.append([trial.user_attrs["source"] for trial in memory._study.get_trials()])
        memory.close()
        store.dispose()
    assert histories[0] == histories[1] and sources[0] == sources[1]
    assert {"first", "prior", "uniform", "incumbent", "sampler"} == set(sources[0])
    assert histories[0][: len(known.first)] == [dict(chosen) for chosen in known.first]


def _killed(trial: Any, search: SearchSpec, number: int) -> dict[str, Any]:
    chosen = trial.suggest_categorical("method", list(search.method))
    if number % 2 and chosen == "lora":
        trial.suggest_categorical("lora_rank", list(search.rank))
    raise KeyboardInterrupt


def test_a_trial_that_was_shown_as_pruned_is_told_all_the_same(tmp_path: Path) -> None:
    """Proves that the sampler's view of a paused trial is no end: its later losses and its end reach the storage."""
    store = Store(f"sqlite:///{tmp_path}/studies.db", create=True)
    memory = Memory(store, "s", 0, "random")
    memory.ask(0, lambda trial: {"x": trial.suggest_float("x", 0, 1)}, {}, ())
    memory.report(0, 0, 2.0)
    memory.ask(1, lambda trial: {"x": trial.suggest_float("x", 0, 1)}, {0: 0}, ())
    memory.report(0, 1, 1.5)
    memory.tell(0, "completed", 1.0, {"reason": "end"})
    memory.close()
    again = Memory(store, "s", 0, "random")
    told = again._storage.get_all_trials(again._study._study_id, deepcopy=False)[0]
    assert (told.state.name, told.value, told.intermediate_values) == ("COMPLETE", 1.0, {0: 2.0, 1: 1.5})
    again.close()
    store.dispose()


def test_a_full_disk_under_the_sampler_is_not_waited_for(memory: Memory) -> None:
    """Proves that SQLITE_FULL in Optuna's tables is a full disk, not a database that is back in a moment."""
    engine = memory._rdb.engine
    with engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
    engine.dispose()
    event.listen(engine, "connect", lambda opened, _: opened.execute(f"PRAGMA max_page_count = {pages + 2}"))
    with pytest.raises(StoreFullError, match="the sampler's tables: database or disk is full") as refused:
        for number in range(2_000):
            ask(memory, number, {}, set())
    assert refused.value.exit_code == 8 and not isinstance(refused.value, StoreUnavailableError)
