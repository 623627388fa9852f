"""From a spec to a stored study: model, data and price are looked at, nothing is paid."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sqlalchemy.exc import IntegrityError

from budgets.ledger import Ledger
from budgets.money import usd
from sweep import clock, fit, inherited, pricing, priors, records, tables
from sweep.audit import MARK
from sweep.errors import BudgetError, DiskError, SweepError, UnusableError, UsageError
from sweep.outline import Outline
from sweep.plan import evaluated, lengths
from sweep.pricing import Quote
from sweep.records import Study
from sweep.spec import Method, Spec
from sweep.standing import roomy
from sweep.store import ORCHESTRATOR_LOCK, Store
from sweep.study import check_sampler
from trainers.memory import Correction
from trainers.messages import FP8_CAPABILITY

RUNS = Path("runs")
CHECK_SECONDS = 3600  # tokenising a large data set may take long; a hang must still end


def study_folder(name: str) -> Path:
    """Where a study's data, workers and trials are kept."""
    return (RUNS / name).resolve()


def look(spec: Spec, folder: Path) -> dict[str, Any]:
    """Looks at model and data in a process of its own and prepares the data; returns the study's facts.

    Raises UnusableError, DiskError, SpecError. A replayed model (`replay:FILE`) brings its facts with it.
    """
    check_sampler(spec.search)
    if spec.search.priors not in {"default", "none"}:
        priors.load(Path(spec.search.priors))  # before the data are prepared, which may take long
    found = _replayed(spec) if spec.model.startswith("replay:") else _checked(spec, folder)
    plan = lengths(spec.search, evaluated(found["data"]))
    chosen = priors.select(spec.search, found, plan.examples)
    found |= {"plan": dataclasses.asdict(plan), "notes": list(chosen.notes) if chosen else []}
    return found | {"priors": chosen.model_dump(mode="json") if chosen else None}


def _checked(spec: Spec, folder: Path) -> dict[str, Any]:
    request = {
        "model": spec.model,
        "train": spec.data.train,
        "validation": spec.data.validation,
        "test": spec.data.test,
        "retention": spec.data.retention,
        "max_tokens": spec.data.max_tokens,
        "seed": spec.seed,
        "out_folder": str(folder / "data"),
        "methods": list(spec.search.method),
        "precision": spec.search.precision,
        "targets": list(spec.search.targets),
        "metric": spec.objective.metric,
        "choices": spec.objective.choices,
        "max_new_tokens": spec.objective.max_new_tokens,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "check.json").write_text(json.dumps(request, indent=1))
    except OSError as error:
        raise DiskError(f"{folder} cannot be written: {error.strerror}", "work in another folder") from error
    answer = _answer(folder / "check.json")
    return answer | {"cores": answer["cpu_cores"]}


def look_at_model(spec: Spec) -> dict[str, Any]:
    """What is seen of a model by its configuration alone, and of this machine. Raises UnusableError."""
    if spec.model.startswith("replay:"):
        raise UnusableError(f"{spec.model} is a recording, which needs no GPU", "name a model's folder or a hub id")
    with tempfile.TemporaryDirectory() as temporary:
        request = Path(temporary) / "check.json"
        asked = {"model": spec.model, "methods": list(spec.search.method), "precision": spec.search.precision}
        request.write_text(json.dumps(asked))
        return _answer(request)


def _answer(request: Path) -> dict[str, Any]:
    command = [sys.executable, "-P", "-m", "trainers.check", str(request)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=CHECK_SECONDS, check=False, env=inherited()
        )
        answer: dict[str, Any] = json.loads(done.stdout)
    except subprocess.TimeoutExpired as error:
        raise UnusableError(f"model and data were not looked through within {CHECK_SECONDS} s") from error
    except json.JSONDecodeError as error:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise SweepError(f"model and data could not be looked at: {last}", f"try: {' '.join(command)}") from error
    if not answer["ok"]:
        kind = DiskError if answer["kind"] == "disk" else UnusableError
        raise kind(answer["message"], answer.get("hint", ""))
    return answer


def _replayed(spec: Spec) -> dict[str, Any]:
    path = Path(spec.model.removeprefix("replay:"))
    try:
        recorded = json.loads(path.read_text())
        rows, validation = recorded["train_rows"], recorded["validation_rows"]
        tokens = recorded["tokens_per_example"]
    except (OSError, json.JSONDecodeError, KeyError) as error:
        raise UnusableError(f"{path} is not a recording: {error}", "see trainers/replay.py for its format") from error
    splits = {
        "train": {"rows": rows, "tokens": round(rows * tokens)},
        "validation": {"rows": validation, "tokens": recorded["validation_tokens"]},
    }
    # As in trainers/replay.py.
    row_tokens = recorded["validation_tokens"] / validation
    test_rows, kept_rows = recorded.get("test_rows", 64), recorded.get("retention_rows", 0)
    splits["test"] = {"rows": test_rows, "tokens": recorded.get("test_tokens") or round(test_rows * row_tokens)}
    if kept_rows:
        splits["retention"] = {"rows": kept_rows, "tokens": round(kept_rows * row_tokens)}
    known = {key: recorded[key] for key in ("hidden_size", "model_type") if key in recorded}
    facts = known | {
        "parameters": recorded["parameters"],
        "device": "replay",
        "cores": os.cpu_count() or 1,
        "seconds": 0.0,
    }
    return facts | {"data": {"splits": splits}}


def compare_gpu(spec: Spec, facts: dict[str, Any]) -> None:
    """Raises UsageError if the machine's GPU is not the one whose price was named."""
    if other := _other_gpu(spec, facts):
        raise UsageError(other, "correct machine.gpu, or add --anyway")


def _other_gpu(spec: Spec, facts: dict[str, Any]) -> str | None:
    """What this machine has instead of the GPU that the spec names; None where it has that one, or none is named."""
    named, device = spec.machine.gpu, facts["device"]
    if named is None or device == "replay":
        return None
    if named.split("-")[0].upper() in device.upper().replace(" ", ""):
        return None
    has = "has no GPU" if device == "cpu" else f"has a {device}"
    return f"the spec names a {named}, this machine {has}"


def on_named_gpu(spec: Spec, facts: dict[str, Any]) -> dict[str, Any]:
    """The facts as they will be on the machine that the spec names, wherever they are looked at."""
    named = spec.machine.gpu
    if named is None or not (other := _other_gpu(spec, facts)):
        return facts
    card = fit.listed_card(named)
    there = {"device": named, "gpus": spec.machine.gpu_count, "capability": None}
    there |= {"gpu_memory_bytes": card.memory if card else None}
    return facts | there | {"notes": [f"{other}: planned for the one that is named", *facts.get("notes", [])]}


def settle_memory(store: Store | None, spec: Spec, facts: dict[str, Any]) -> None:
    """Refuses what can't fit on this machine's GPU, and adds to the facts how full-parameter trials are trained.

    Without a `store` no earlier study corrects the predictions. Raises SpecError.
    """
    corrections: dict[Method, Correction] = {}
    if store is not None:
        with store.read() as connection:
            corrections = fit.learned(connection, spec.model, facts["device"])
    facts |= fit.settle(spec, facts, corrections)


def create(store: Store, spec: Spec, facts: dict[str, Any], quote: Quote, folder: Path, boot: tuple[str, int]) -> Study:
    """Stores a new study, funds its budget with the cap and sets the reserve aside.

    `boot` is this machine's boot id and clock. Raises UsageError if the name is taken, DiskError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if quote.unit == "Mtok":
            pricing.write_token_meter(folder)
    except OSError as error:
        raise DiskError(f"{folder} cannot be written: {error.strerror}", "work in another folder") from error
    try:
        with store.write() as connection:
            connection.execute(
                tables.study.insert().values(
                    name=spec.study,
                    spec=json.dumps(spec.resolved()),
                    facts=json.dumps(facts),
                    folder=str(folder),
                    micros_per_hour=quote.tariff.now,
                    unit=quote.unit,
                    created_unix_ms=clock.unix_ms(),
                )
            )
            ledger = Ledger(connection, spec.study)
            ledger.open(spec.budget.cap)
            if spec.budget.reserve:
                ledger.set_aside(spec.budget.reserve, "launch")
            pricing.store_price(connection, spec.study, quote.tariff, quote.note, boot)
            text = f"cap {usd(spec.budget.cap)} at {usd(quote.tariff.now)}/{quote.unit}"
            records.note(connection, spec.study, "created", text)
            for words in facts.get("notes", []):
                records.note(connection, spec.study, "plan", words)
            return records.study(connection, spec.study)
    except IntegrityError as error:
        raise exists(spec.study) from error


@contextlib.contextmanager
def provisional(folder: Path) -> Iterator[None]:
    """A study's folder that is removed again if the launch comes to nothing, unless it was there before.

    Or somebody launched a study of that name meanwhile, while this one waited for an answer.
    """
    before = folder.exists()
    try:
        yield
    except BaseException:
        if not before and not (folder / ORCHESTRATOR_LOCK).exists():
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):
                folder.parent.rmdir()  # runs/, where nothing else is in it
        raise


def refuse_nothing(planned: Outline, notes: Sequence[str] = ()) -> None:
    """Raises BudgetError for a plan whose search begins no trial: such a study would end at once, without a word.

    `notes`: what the forecasts come from, where that is not the machine alone.
    """
    if planned.trials:
        return
    run, overhead = min(run.cost for run in planned.runs if run.searched), planned.phase("overhead").cost
    enough = usd(roomy(overhead + run) + planned.reserve)
    ways = [f"raise budget.cap to {enough} or so", *["lower budget.reserve"] * bool(planned.reserve)]
    raise BudgetError(
        f"the {usd(planned.cap - planned.reserve)} for the search pay for no trial: a worker's start and end are "
        f"forecast at {usd(overhead)}, a run at {usd(run)}, and some is kept for what takes longer",
        "; ".join([f"{', '.join(ways)}, or shorten search.epochs", *notes, "--anyway launches it all the same"]),
    )


# Listed GPUs that are older, or whose 8-bit floats are others.
WITHOUT_FP8 = frozenset(["A10", "A10G", "A100", "A30", "V100", "RTX3090", "RTX6000", "RTXA4000", "RTXA6000", "MI300X"])
EIGHT_BIT = ("bitsandbytes", "torchao")  # either of them has AdamW with 8-bit moments


def refuse_optimizer(spec: Spec) -> None:
    """Raises UnusableError where full training wants 8-bit moments and no library for them is installed.

    A worker would find out too, but it is paid for.
    """
    wanted = "full" in spec.search.method and spec.full.optimizer == "adamw-8bit"
    if wanted and not spec.model.startswith("replay:") and not any(map(find_spec, EIGHT_BIT)):
        raise UnusableError(
            "full.optimizer adamw-8bit: neither bitsandbytes nor torchao is installed",
            "pip install bitsandbytes, or write full: {optimizer: adamw}",
        )


def refuse_device(spec: Spec, facts: Mapping[str, Any]) -> None:
    """Raises UnusableError where the spec's device is a GPU that this machine does not have. A worker is paid for."""
    kind, _, index = spec.machine.device.partition(":")
    gpus = facts.get("gpus", 0)
    if kind == "cuda" and facts["device"] != "replay" and int(index or 0) >= gpus:
        raise UnusableError(
            f"machine.device {spec.machine.device}: this machine has {gpus} usable GPUs",
            "write auto or cpu, or launch where that GPU is",
        )


def settle_precision(spec: Spec, facts: dict[str, Any]) -> None:
    """Notes that a search is in 8-bit floats, and refuses it where the GPU has no such products: a worker is paid for.

    `facts` are of this machine, or of the GPU that the spec names. On a CPU it is a rehearsal. Raises UnusableError.
    """
    if spec.search.precision == "bf16":
        return
    found, device = facts.get("capability"), facts["device"]
    old = device.split("-")[0] in WITHOUT_FP8 if found is None else tuple(found) < FP8_CAPABILITY
    if old and spec.machine.device != "cpu":
        raise UnusableError(
            f"search.precision fp8: {device} does not multiply 8-bit floats, as GPUs since Ada and Hopper do",
            "write search.precision: bf16, or launch on a newer GPU",
        )
    facts["notes"] = [*facts.get("notes", []), "the search is in 8-bit floats, what is confirmed in bf16"]


def exists(name: str) -> UsageError:
    """The error for a study that is there already."""
    return UsageError(f"study {name} exists already", f"sweep resume {name}, or launch under another --study name")


def refuse_taken(store: Store, name: str, folder: Path) -> None:
    """Raises UsageError if there is a study of this name, or what one left, before anything is prepared under it."""
    with store.read() as connection:
        if name in records.study_names(connection):
            raise exists(name)
    if any((folder / trace).exists() for trace in (MARK, "workers")):
        raise UsageError(
            f"{folder} is another study's, which this database does not hold",
            "remove the folder if it is of no use any more, or launch under another --study name",
        )
