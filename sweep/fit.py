"""What fits on the GPU: the predicted peak of every class of configurations of a spec, and what would make one fit.

A class is what memory depends on: of LoRA trials targets and rank, of full-parameter ones how they are trained. Pure,
but for `learned`, which reads what earlier studies measured.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection, select

from budgets.prices import listed
from sweep import tables
from sweep.errors import SpecError, UsageError
from sweep.records import Study
from sweep.spec import MAX_SLOTS, FullSpec, Method, Spec
from trainers.memory import (
    GIB,
    MICRO_TOKENS,
    ROUNDED_BYTES,
    SHARDED_TOKENS,
    SHORTEST_STREAM,
    Correction,
    Peak,
    Setup,
    Shape,
    correct,
    full_tokens,
    peak,
    room,
    slots_beside,
)
from trainers.messages import TrialConfig

FEWEST_TOKENS = 128  # of a row: shorter ones are no remedy
SEVERAL = (2, 4, 8)  # GPUs of one machine

Corrections = Mapping[Method, Correction]


@dataclass(frozen=True)
class Card:
    """A GPU: its memory in bytes and where that is known from."""

    name: str
    memory: int
    source: str

    @property
    def room(self) -> int:
        """What a prediction may fill."""
        return room(self.memory)


@dataclass(frozen=True)
class Remedy:
    """A change of the spec's keys and what a misfit would need after it, in bytes a GPU."""

    changes: dict[str, Any]
    peak: int
    fits: bool

    @property
    def words(self) -> str:
        """The changes as they are written in a spec."""
        return in_words(self.changes)


@dataclass(frozen=True)
class Row:
    """One class: what it needs, whether that fits, and what would make it fit, cheapest first.

    `slots`: LoRA trials of this class that fit beside each other.
    """

    setup: Setup
    peak: Peak
    fits: bool
    slots: int | None = None
    remedies: tuple[Remedy, ...] = ()

    @property
    def words(self) -> str:
        """The class in a few words."""
        setup = self.setup
        if setup.method == "lora":
            return f"lora {setup.targets} r{setup.rank}"
        several = f" on {setup.processes} GPUs" if setup.processes > 1 else ""
        return f"full {setup.optimizer}{' checkpointed' if setup.checkpointing else ''}{several}"

    @property
    def remedy(self) -> Remedy | None:
        """The cheapest that is enough."""
        return next((remedy for remedy in self.remedies if remedy.fits), None)

    def as_json(self) -> dict[str, Any]:
        """Plain values; bytes."""
        setup = self.setup
        lora = setup.method == "lora"
        own: dict[str, Any] = {"targets": setup.targets, "rank": setup.rank}
        if not lora:
            own = {"optimizer": setup.optimizer, "checkpointing": setup.checkpointing, "processes": setup.processes}
        remedies = [{"changes": r.changes, "peak_bytes": r.peak, "fits": r.fits} for r in self.remedies]
        return {
            "configuration": self.words,
            "method": setup.method,
            **own,
            "tokens": setup.tokens,
            "peak_bytes": self.peak.total,
            "parts": dict(self.peak.parts),
            "fits": self.fits,
            "slots": self.slots,
            "remedies": remedies,
        }


def in_words(changes: Mapping[str, Any]) -> str:
    """Changes of a spec's keys as they are written there; several of one section as one line of it."""
    sections: dict[str, dict[str, str]] = defaultdict(dict)
    for path, value in changes.items():
        section, _, key = path.partition(".")
        shown = f"[{', '.join(map(str, value))}]" if isinstance(value, list) else str(value)
        sections[section][key] = "true" if value is True else shown
    found = []
    for section, keys in sections.items():
        inner = ", ".join(f"{key}: {value}" for key, value in keys.items())
        found.append(f"{section}: {{{inner}}}" if len(keys) > 1 else f"{section}.{inner}")
    return ", ".join(found)


def gib(size: float) -> str:
    """Bytes in GiB with one decimal."""
    return f"{size / GIB:.1f} GiB"


def listed_card(gpu: str) -> Card | None:
    """A GPU of the price list; cards are sold by their GiB."""
    found = [price.gpu_memory_gib for price in listed() if price.gpu.lower() == gpu.lower()]
    return Card(gpu, min(found) * GIB, "budgets/prices.csv") if found else None


def pick_card(spec: Spec, facts: Mapping[str, Any], stated: int | None) -> Card:
    """The GPU that is meant: of stated memory (bytes), the named one, or this machine's. Raises UsageError."""
    if stated is not None:
        return Card("a GPU", stated, "--memory")
    if spec.machine.gpu is not None and (card := listed_card(spec.machine.gpu)) is not None:
        return card
    if facts["gpu_memory_bytes"] is not None:
        return Card(facts["device"], facts["gpu_memory_bytes"], "this machine")
    raise UsageError("the spec names no listed GPU and this machine has none", "add --memory 80GB, or machine.gpu")


# --- classes ----------------------------------------------------------------------------------------------------------


def rows(spec: Spec, shape: Shape, card: Card, longest: int, corrections: Corrections) -> list[Row]:
    """Every class of the spec's space. `longest` example in tokens."""
    found = []
    if "lora" in spec.search.method:
        for targets in spec.search.targets:
            found += [_lora(spec, shape, card, longest, corrections, targets, rank) for rank in spec.search.rank]
    if "full" in spec.search.method:
        found += [_full(spec, shape, card, longest, corrections, full) for full in _ways(spec.full)]
    return found


def _ways(full: FullSpec) -> list[FullSpec]:
    """How full-parameter trials may be trained: both ways where checkpointing is automatic."""
    wanted = [False, True] if full.checkpointing == "auto" else [full.checkpointing]
    return [full.model_copy(update={"checkpointing": way}) for way in wanted]


def _lora(spec: Spec, shape: Shape, card: Card, longest: int, corrections: Corrections, targets: Any, rank: int) -> Row:
    correction, full = corrections.get("lora", Correction()), max(MICRO_TOKENS, longest)
    lengths = [tokens for tokens in (full, full // 2, full // 4) if tokens >= max(longest, SHORTEST_STREAM)]
    # The engine takes shorter streams where long ones don't fit.
    setups = [Setup(method="lora", tokens=tokens, targets=targets, rank=rank) for tokens in lengths]
    setup, needed = _first_that_fits(shape, card, correction, setups)
    fits = needed.total <= card.room
    slots = slots_beside(shape, setup, card.room, correction, MAX_SLOTS)
    remedies = () if fits else tuple(_lora_remedies(spec, shape, card, longest, correction, setup))
    return Row(setup, needed, fits, slots, remedies)


def _first_that_fits(shape: Shape, card: Card, correction: Correction, setups: Sequence[Setup]) -> tuple[Setup, Peak]:
    """The first of several ways that fits, or the last one, with what it needs."""
    needed = [(setup, correction.apply(peak(shape, setup))) for setup in setups]
    return next(((setup, found) for setup, found in needed if found.total <= card.room), needed[-1])


def _lora_remedies(
    spec: Spec, shape: Shape, card: Card, longest: int, correction: Correction, setup: Setup
) -> Iterator[Remedy]:
    """Shorter rows, then smaller adapters."""

    def remedy(changes: dict[str, Any], **changed: Any) -> Remedy:
        total = correction.apply(peak(shape, replace(setup, **changed))).total
        return Remedy(changes, total, total <= card.room)

    if spec.search.precision == "fp8":
        plain = replace(shape, weight_bytes=shape.weight_bytes - ROUNDED_BYTES)
        total = correction.apply(peak(plain, setup)).total
        yield Remedy({"search.precision": "bf16"}, total, total <= card.room)
    tokens = longest // 2
    while tokens >= SHORTEST_STREAM:
        yield remedy({"data.max_tokens": tokens}, tokens=tokens)
        tokens //= 2
    for rank in sorted((r for r in spec.search.rank if r < setup.rank), reverse=True):
        yield remedy({"search.rank": [rank]}, rank=rank)
    if setup.targets != "attention" and shape.linears.get("attention"):
        yield remedy({"search.targets": ["attention"]}, targets="attention")


# Several GPUs gather weights for every part of a batch: few parts, once each. What takes less memory comes next.
TOGETHER = ((SHARDED_TOKENS, True), (SHARDED_TOKENS, False), (MICRO_TOKENS, False))


def full_setup(spec: Spec, full: FullSpec, longest: int, most: int = MICRO_TOKENS, gathered: bool = False) -> Setup:
    """How a spec's full-parameter trials train, as `full` says, `most` tokens at once."""
    tokens, accumulates = full_tokens(spec.search.batch_size, longest, full.processes, most)
    return Setup(
        method="full",
        tokens=tokens,
        optimizer=full.optimizer,
        checkpointing=full.checkpointing is True,
        processes=full.processes,
        accumulates=accumulates,
        gathered=gathered,
    )


def _full(spec: Spec, shape: Shape, card: Card, longest: int, corrections: Corrections, full: FullSpec) -> Row:
    correction = corrections.get("full", Correction())
    ways = TOGETHER if full.processes > 1 else ((MICRO_TOKENS, False),)
    setups = [full_setup(spec, full, longest, most, gathered) for most, gathered in ways]
    setup, needed = _first_that_fits(shape, card, correction, setups)
    fits = needed.total <= card.room
    remedies = () if fits else tuple(_full_remedies(spec, shape, card, longest, correction, full))
    return Row(setup, needed, fits, None, remedies)


def _full_remedies(
    spec: Spec, shape: Shape, card: Card, longest: int, correction: Correction, full: FullSpec
) -> Iterator[Remedy]:
    """Cheapest first: checkpointing costs about a third more time, 8-bit states a little precision, shorter rows data,
    and more GPUs their price. Ends with the first that is enough; what needs as much as a cheaper one is left out."""
    least = max(FEWEST_TOKENS, longest // 8)
    lighter: list[dict[str, Any]] = [{}, {"full.checkpointing": True}, {"full.optimizer": "adamw-8bit"}]
    lighter.append(lighter[1] | lighter[2])
    shorter: list[dict[str, Any]] = [{"data.max_tokens": tokens} for tokens in _halves(longest, least)]
    changes: list[dict[str, Any]] = [*lighter[1:], *shorter, *(lighter[3] | fewer for fewer in shorter)]
    for count in SEVERAL:
        changes += [{"full.processes": count} | lighten for lighten in lighter]
    own = {"full.checkpointing": full.checkpointing, "full.optimizer": full.optimizer}
    lowest = math.inf
    for change in changes:
        change = {key: value for key, value in change.items() if own.get(key) != value}
        if not change or change.get("full.processes", math.inf) <= full.processes:
            continue
        update = {key.removeprefix("full."): value for key, value in change.items() if key.startswith("full.")}
        setup = full_setup(spec, full.model_copy(update=update), change.get("data.max_tokens", longest))
        total = correction.apply(peak(shape, setup)).total
        if total < lowest:
            yield Remedy(change, total, total <= card.room)
        if total <= card.room:
            return
        lowest = min(lowest, total)


def _halves(tokens: int, least: int) -> Iterator[int]:
    while (tokens := tokens // 2) >= least:
        yield tokens


def as_json(
    spec: Spec, facts: Mapping[str, Any], card: Card, found: list[Row], corrections: Corrections
) -> dict[str, Any]:
    """What `sweep fit` says, as plain values; bytes."""
    return {
        "model": spec.model,
        "parameters": facts["parameters"],
        "gpu": card.name,
        "memory_bytes": card.memory,
        "memory_source": card.source,
        "room_bytes": card.room,
        "rows": [row.as_json() for row in found],
        "corrections": {method: correction.as_json() for method, correction in corrections.items()},
    }


# --- before a launch --------------------------------------------------------------------------------------------------


def settle(spec: Spec, facts: Mapping[str, Any], corrections: Corrections) -> dict[str, Any]:
    """Decides whether full-parameter trials keep activations, and refuses what can't fit on this machine's GPU.

    Returns `checkpointing` and, where there is a GPU, `full_tokens` and `full_gathered` as a worker's job has them and
    `memory`, a line for people. Raises SpecError. Nothing is refused on a CPU, on recorded curves and for a model whose
    memory cannot be predicted.
    """
    wanted = spec.full.checkpointing is True
    if not facts.get("gpu_memory_bytes") or not facts.get("shape"):
        return {"checkpointing": wanted}
    shape, card = Shape(**facts["shape"]), Card(facts["device"], facts["gpu_memory_bytes"], "this machine")
    longest = max(split.get("longest", spec.data.max_tokens) for split in facts["data"]["splits"].values())
    found = rows(spec, shape, card, longest, corrections)
    lora = [row for row in found if row.setup.method == "lora"]
    full = [row for row in found if row.setup.method == "full"]
    for row in lora:
        if not row.fits:
            raise _refusal("search.rank" if len(spec.search.rank) > 1 else "search.targets", row, card)
    if full and not any(row.fits for row in full):
        raise _refusal("search.method", full[-1], card)
    if full and spec.full.processes > facts.get("gpus", spec.full.processes):
        count = facts["gpus"]
        raise SpecError(f"full.processes: {spec.full.processes} GPUs are wanted, this machine has {count}", "")
    if lora:
        _check_slots(spec, shape, card, longest, corrections)
    chosen = next((row for row in full if row.fits), None)
    return {
        "checkpointing": chosen.setup.checkpointing if chosen else wanted,
        "full_tokens": max(chosen.setup.tokens, MICRO_TOKENS) if chosen else None,
        "full_gathered": chosen is not None and chosen.setup.gathered,
        "memory": _line([*lora, *([chosen] if chosen else [])], card),
    }


def full_training(spec: Spec, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What a worker's job says of full training: as the spec does, and as `settle` decided."""
    return {
        "optimizer": spec.full.optimizer,
        "checkpointing": bool(facts.get("checkpointing")),
        "full_tokens": facts.get("full_tokens"),
        "full_gathered": bool(facts.get("full_gathered")),
        "processes": spec.full.processes,
    }


def _line(found: list[Row], card: Card) -> str:
    needed = []
    for method in ("lora", "full"):
        if of_method := [row for row in found if row.setup.method == method]:
            most = max(of_method, key=lambda row: row.peak.total)
            slots = "" if most.slots is None else f", {most.slots} of them at once at most"
            needed.append(f"{gib(most.peak.total)} for {most.words}{slots}")
    return f"{'; '.join(needed)}; of {gib(card.room)} that may be filled"


def _refusal(key: str, row: Row, card: Card) -> SpecError:
    remedy = row.remedy
    message = f"{key}: {row.words} needs {gib(row.peak.total)} on one GPU; of {card.name}'s {gib(card.memory)}"
    hint = f"it would fit with {remedy.words}: {gib(remedy.peak)}" if remedy else "use a GPU with more memory"
    other = ", or search the other method alone" if row.setup.method == "full" else ""
    return SpecError(f"{message}, {gib(card.room)} may be filled", f"{hint}{other}; `sweep fit` shows all")


def _check_slots(spec: Spec, shape: Shape, card: Card, longest: int, corrections: Corrections) -> None:
    """Refuses a stated number of slots for whose adapters the largest rank leaves no room. Raises SpecError."""
    slots = spec.machine.slots
    if slots == "auto":
        return
    correction = corrections.get("lora", Correction())
    targets = max(spec.search.targets, key=shape.per_rank)
    setup = Setup(
        method="lora", tokens=max(longest, SHORTEST_STREAM), targets=targets, rank=max(spec.search.rank), slots=slots
    )
    needed = correction.apply(peak(shape, setup)).total
    if needed > card.room:
        most = slots_beside(shape, setup, card.room, correction, slots)
        raise SpecError(
            f"machine.slots: {slots} trials of rank {setup.rank} on {targets} need {gib(needed)}; of {card.name}'s "
            f"{gib(card.memory)}, {gib(card.room)} may be filled",
            f"{most} fit; set machine.slots: {most}, or auto",
        )


# --- what was measured ------------------------------------------------------------------------------------------------


def learned(connection: Connection, model: str, device: str) -> dict[Method, Correction]:
    """Corrections by method from the peaks that earlier studies of this model on this GPU measured.

    `device` is a GPU's own name, or one of the price list.
    """
    predicted: dict[Method, list[Peak]] = defaultdict(list)
    measured: dict[Method, list[int]] = defaultdict(list)
    studies = connection.execute(select(tables.study.c.name, tables.study.c.spec, tables.study.c.facts))
    for name, spec_text, facts_text in studies.all():
        facts, spec = json.loads(facts_text), json.loads(spec_text)
        if spec["model"] != model or not facts.get("shape") or not _is(facts["device"], device):
            continue
        for config, width, bytes_ in _peaks(connection, name):
            if (setup := _setup_of(config, width, Spec.model_validate(spec), facts)) is not None:
                predicted[config.method].append(peak(Shape(**facts["shape"]), setup))
                measured[config.method].append(bytes_)
    return {method: correct(peaks, measured[method]) for method, peaks in predicted.items()}


def predicted(study: Study, config: TrialConfig, width: float) -> int | None:
    """Peak bytes of a trial among `width` in a pack, by the formulas alone; None where the model's shape is not known.

    Not corrected: what a study measured would correct its own predictions.
    """
    if not (shape := study.facts.get("shape")):
        return None
    setup = _setup_of(config, width, study.spec, study.facts)
    return None if setup is None else peak(Shape(**shape), setup).total


def _is(device: str, named: str) -> bool:
    """Whether a device is of the named kind: `NVIDIA H100 80GB HBM3` is an H100-80GB."""
    return device == named or named.split("-")[0].upper() in device.upper().replace(" ", "")


def _peaks(connection: Connection, study: str) -> list[tuple[TrialConfig, float, int]]:
    evaluation, trial = tables.evaluation.c, tables.trial.c
    joined = (evaluation.study == trial.study) & (evaluation.trial == trial.number)
    query = select(trial.config, evaluation.width, evaluation.peak_bytes).where(
        joined, evaluation.study == study, evaluation.peak_bytes.is_not(None)
    )
    return [(TrialConfig(**json.loads(text)), width, size) for text, width, size in connection.execute(query).all()]


def _setup_of(config: TrialConfig, width: float, spec: Spec, facts: Mapping[str, Any]) -> Setup | None:
    """How a trial was trained; None where that is not known. Neighbours in a pack are taken to be like it."""
    train = facts["data"]["splits"]["train"]
    if config.method == "full":
        mean = train["tokens"] / train["rows"]
        batch = round(config.batch_size * mean / spec.full.processes)
        most = facts.get("full_tokens") or MICRO_TOKENS
        tokens = max(min(batch, most), train.get("longest", 0))
        full = spec.full.model_copy(update={"checkpointing": bool(facts.get("checkpointing"))})
        return replace(
            full_setup(spec, full, 1, gathered=bool(facts.get("full_gathered"))),
            tokens=tokens,
            accumulates=batch > most,
        )
    tokens = facts.get("stream_tokens")
    if tokens is None or config.rank is None or config.targets is None:
        return None
    return Setup(method="lora", tokens=tokens, targets=config.targets, rank=config.rank, slots=max(1, round(width)))
