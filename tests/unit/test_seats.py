"""How many trials train at once, who takes a free seat, and what a pack computes beside what it trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import recorded

from sweep import launch, records, seats, summary, tables
from sweep.errors import UnusableError
from sweep.instruct import Instructor
from sweep.projection import Plan
from sweep.records import Study, TrialRow, WorkerRow
from sweep.spec import Spec
from trainers.messages import Admit, Drop, Pause, TrialConfig

PLAN = Plan(examples=100, run_tokens=10_000, rungs=(1_000,), rung_rows=16, rung_tokens=300, validation_tokens=900)


def a_study(device: str = "NVIDIA H100", **changes: Any) -> Study:
    """What seats ask of a study: the search's methods and live set, the machine's slots, the device that was seen."""
    values = {"slots": "auto", "on": "auto", "live": 4, "method": ("lora", "full")} | changes
    machine = SimpleNamespace(slots=values["slots"], device=values["on"])
    search = SimpleNamespace(method=values["method"], live=values["live"])
    spec = SimpleNamespace(machine=machine, search=search)
    return cast(Study, SimpleNamespace(spec=spec, facts={"device": device}))


def workers(*lora: int) -> list[WorkerRow]:
    """Workers that said so many LoRA slots; one that said nothing has zero here."""
    rows = [
        SimpleNamespace(id=f"w{n}", slots={"lora": count, "full": 1} if count else {}) for n, count in enumerate(lora)
    ]
    return cast(list[WorkerRow], rows)


def trial(number: int, method: str = "lora", state: str = "live", slot: str | None = "w0") -> TrialRow:
    """A trial, seated unless `slot` is None."""
    values: dict[str, Any] = {"method": method, "learning_rate": 1e-3, "batch_size": 4, "examples": 100, "seed": 0}
    row = records.newcomer(TrialConfig(number=number, **values))
    return TrialRow(**(row.__dict__ | {"state": state, "slot": slot}))


@pytest.mark.parametrize(
    ("study", "said", "slots", "live"),
    [
        (a_study(), [], 4, 5),  # the probe may find more: then the worker says so
        (a_study(), [16], 16, 20),
        (a_study(), [16, 12, 0], 12, 15),
        (a_study("cpu"), [], 1, 4),
        (a_study("replay"), [], 1, 4),
        (a_study(on="cpu"), [], 1, 4),
        (a_study("cpu", slots=8), [], 8, 10),
        (a_study(slots=2), [], 2, 4),
        (a_study(slots=8, method=("full",)), [8], 1, 4),
    ],
)
def test_slots_are_what_the_worker_says(study: Study, said: list[int], slots: int, live: int) -> None:
    """Proves where the number comes from: a worker, else the spec, else the device; a pack has a quarter more."""
    assert (seats.slots(study, workers(*said)), seats.live(study, workers(*said))) == (slots, live)


def test_a_gpu_is_probed_unless_the_spec_says_slots() -> None:
    """Proves when a worker's start has to be forecast with a probe."""
    assert seats.probes(a_study()) and not seats.probes(a_study("cpu")) and not seats.probes(a_study("replay"))
    assert not seats.probes(a_study(slots=4)) and not seats.probes(a_study(method=("full",)))


def test_the_width_is_of_lora_trials_that_run() -> None:
    """Proves that neither paused trials nor full-parameter ones share the machine, and that slots bound the width."""
    rows = [trial(0), trial(1, state="waiting"), trial(2, state="paused"), trial(3, "full"), trial(4, state="judging")]
    assert [seats.width(slots, rows) for slots in (1, 2, 8)] == [1, 2, 3]
    assert seats.width(8, []) == 1


def test_a_seat_is_free_for_one_method() -> None:
    """Proves that a pack fills up, that one who was told to leave makes room, and that methods do not mix."""
    (worker,) = workers(2)
    comes, other = trial(9, slot=None), trial(8, "full", slot=None)
    assert seats.free(worker, comes, []) and seats.free(worker, other, [])
    assert seats.free(worker, comes, [trial(0)]) and not seats.free(worker, other, [trial(0)])
    assert not seats.free(worker, comes, [trial(0), trial(1, state="judging")])
    assert seats.free(worker, comes, [trial(0), trial(1, state="paused")])
    assert not seats.free(worker, comes, [trial(0, "full")])


def test_what_was_trained_counts_once_it_is_kept(tmp_path: Path) -> None:
    """Proves what a worker that dies again and again is known by: steps that must be taken again are no progress, nor
    is a seat taken at a checkpoint."""
    store = recorded.study(tmp_path)
    with store.write() as connection:
        records.add_trial(connection, "words", trial(0).config, 1)
        before = records.kept(connection, "words")
        for ordinal in (1, 2):
            seats.take(connection, "words", cast(WorkerRow, SimpleNamespace(id="w", ordinal=ordinal)), trial(0))
        connection.execute(tables.attempt.update().values(tokens=5_600))
        connection.execute(tables.trial.update().values(tokens=5_600))
        assert records.kept(connection, "words") == before
        changes: list[dict[str, Any]] = [
            {"checkpoint_tokens": 5_000},
            {"checkpoint_tokens": 9_000},
            {"state": "pruned"},
        ]
        for values in changes:
            connection.execute(tables.trial.update().values(**values))
            before, last = records.kept(connection, "words"), before
            assert before != last
    store.dispose()


def test_a_gpu_that_is_not_there_is_refused_before_it_is_paid() -> None:
    """Proves which devices a launch takes on a machine without a GPU, with one, and on recorded curves."""

    def spec(device: str) -> Spec:
        return cast(Spec, SimpleNamespace(machine=SimpleNamespace(device=device)))

    for device, facts in (("cuda", {"device": "cpu", "gpus": 0}), ("cuda:1", {"device": "NVIDIA H100", "gpus": 1})):
        with pytest.raises(UnusableError, match=rf"machine\.device {device}: this machine has {facts['gpus']} usable"):
            launch.refuse_device(spec(device), facts)
        launch.refuse_device(spec(device), {"device": "replay"})
        launch.refuse_device(spec("auto"), facts)
    launch.refuse_device(spec("cuda"), {"device": "NVIDIA H100", "gpus": 1})


def test_a_gpu_without_8_bit_products_is_refused_before_it_is_paid() -> None:
    """Proves that fp8 asks for compute capability 8.9; a CPU, on which it is a rehearsal, and recordings take it."""

    def spec(precision: str, device: str = "auto") -> Spec:
        search, machine = SimpleNamespace(precision=precision), SimpleNamespace(device=device)
        return cast(Spec, SimpleNamespace(search=search, machine=machine))

    old = {"device": "NVIDIA A100", "capability": [8, 0]}
    with pytest.raises(UnusableError, match=r"search\.precision fp8: NVIDIA A100 does not multiply 8-bit floats"):
        launch.settle_precision(spec("fp8"), old)
    with pytest.raises(UnusableError, match=r"A100-40GB does not multiply"):
        launch.settle_precision(spec("fp8"), {"device": "A100-40GB", "capability": None})
    for chosen, noted in ((spec("bf16"), False), (spec("fp8", "cpu"), True)):
        facts = dict(old)
        launch.settle_precision(chosen, facts)
        assert ("notes" in facts) is noted
    for fits in (
        {"device": "NVIDIA L4", "capability": [8, 9]},
        {"device": "cpu", "capability": None},
        {"device": "H100-80GB"},
    ):
        launch.settle_precision(spec("fp8"), fits)


def test_occupancy_is_weighted_by_what_was_computed(tmp_path: Path) -> None:
    """Proves the statement's figure: what nobody measured is left out, and full-parameter training pads nothing."""
    store = recorded.study(tmp_path)
    shares = {"a": 0.5, "b": 0.8, "c": None}
    rows = [SimpleNamespace(id=name, occupancy=share) for name, share in shares.items()]
    trials = [trial(0), trial(1), trial(2, "full")]
    with store.write() as connection:

        def occupancy() -> float | None:
            return summary._occupancy(connection, "words", trials, cast(list[WorkerRow], rows))

        assert occupancy() is None
        for row in trials:
            records.add_trial(connection, "words", row.config, 1)
        attempts = [(0, "a", 0, 100), (0, "b", 100, 500), (1, "c", 0, 9_000), (2, "c", 0, 300)]
        for place, (number, worker, start, end) in enumerate(attempts):
            named = {"study": "words", "trial": number, "worker": worker, "from_tokens": start, "tokens": end}
            connection.execute(tables.attempt.insert().values(id=str(place), **named))
        assert occupancy() == pytest.approx(800 / (200 + 500 + 300))
    store.dispose()


class Told:
    """A launcher that keeps what it was told to send."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, folder: Path, command: Any) -> bool:
        """See Launcher."""
        self.sent.append(command)
        return True


@pytest.mark.parametrize(("state", "leaves"), [("paused", Pause), ("pruned", Drop)])
def test_a_worker_that_may_not_know_a_trial_is_told_of_it_before_it_leaves(state: str, leaves: type[Any]) -> None:
    """Proves that a seat is given back: the orchestrator died between the seat in its tables and the word to the
    worker, and by now the trial is to leave, which a worker that never heard of it would not answer."""
    for reattached, words in ((True, [Admit, leaves]), (False, [leaves])):
        launcher = Told()
        instructor = Instructor(cast(Any, launcher), PLAN)
        instructor.reattached = "w0" if reattached else None
        study = SimpleNamespace(fence=3, folder="study", base_loss=1.0)
        worker = SimpleNamespace(id="w0", folder="worker")
        current = SimpleNamespace(fence=3) if reattached else None
        for _ in range(2):
            row = replace(trial(0, state=state), attempt="a", checkpoint="ckpt")
            instructor.instruct(cast(Any, study), cast(Any, worker), [row], cast(Any, current), examined=True)
        sent = [command for command in launcher.sent if command is not current]
        assert [type(command) for command in sent] == words
        if reattached:
            assert (sent[0].attempt, sent[0].resume) == ("a", "ckpt")
