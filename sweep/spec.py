"""The YAML spec as frozen models that refuse unknown keys, naming the key, the nearest known one and the line.

What a user leaves out has a default here and nowhere else; the resolved copy is stored with the study.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from budgets.money import MICROS, MoneyError, Rate, parse_rate, parse_usd
from sweep.errors import SpecError
from sweep.explain import explain, foremost, lines_of, repeated
from trainers.messages import Precision

T = typing.TypeVar("T")
Method = Literal["lora", "full"]
Targets = Literal["attention", "mlp", "all-linear"]
MAX_SLOTS = 64
PATIENCE = 20  # trials, where patience is asked for without any limit
NEW = {"new": True}  # the context of a spec that was just read: what is stored was launched under the rules of its time
RESERVE_SHARE = 0.25  # of the cap, for the endgame, unless budget.reserve says otherwise
CLASS = r"[A-Za-z_][\w.]*:[A-Za-z_]\w*"  # a user's own class: module:Class


def _exact(micros: int) -> str:
    return f"${(Decimal(micros) / MICROS).normalize():f}"


def _listed(value: Any, info: ValidationInfo) -> Any:
    values = value if isinstance(value, list | tuple) else [value]
    if info.context and any(isinstance(one, bool) for one in values):  # which Python takes for 1 and 0
        raise ValueError("true and false are no choices")
    return values


def _once_each(values: tuple[T, ...], info: ValidationInfo) -> tuple[T, ...]:
    twice = info.context and next((value for place, value in enumerate(values) if value in values[:place]), None)
    if twice is not None:
        raise ValueError(f"{twice} stands there twice")
    return values


def _rate(value: Any) -> Rate:
    rate = value if isinstance(value, Rate) else parse_rate(value)
    if rate.micros <= 0:
        raise MoneyError(f"a price must be positive, not {value}")
    return rate


def _slots(value: Any) -> Any:
    # A union would complain about each of its members; and YAML's `on` is true, which Python takes for 1.
    whole = isinstance(value, int) and not isinstance(value, bool)
    if value != "auto" and not (whole and 1 <= value <= MAX_SLOTS):
        raise ValueError(f"is `auto`, or how many LoRA trials train at once on one worker, 1 to {MAX_SLOTS}")
    return value


def _rungs(value: Any) -> Any:
    if value == "none":
        return ()
    if isinstance(value, str) and value not in {"auto", "halving", "hyperband"} and not re.fullmatch(CLASS, value):
        raise ValueError(
            "is a list of shares such as [0.1, 0.3], `auto`, `halving`, `hyperband`, `none` or module:Class"
        )
    return value


def _sampler(value: Any) -> Any:
    known = value in ("curves", "tpe", "gp", "random", "cmaes")
    if not known and not (isinstance(value, str) and re.fullmatch(CLASS, value)):
        raise ValueError("is `curves`, `tpe`, `gp`, `random`, `cmaes` or module:Class, an Optuna sampler of your own")
    return value


def _warm_start(value: Any) -> Any:
    if value in ("off", False):  # YAML's `off` is false
        return "off"
    if value != "auto" and not (isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)):
        raise ValueError("is `auto`, `off` or a list of studies' names")
    return value


def _stop(value: Any) -> Any:
    # YAML's `off` is false.
    if value in ("off", False, None):
        return {}
    if isinstance(value, str) and value not in ("patience", "utility"):
        raise ValueError("is `off`, `patience`, or a section with patience and utility")
    return {value: {}} if isinstance(value, str) else value


def _metric(value: Any) -> Any:
    return {"metric": value} if isinstance(value, str) else value


def _known_metric(value: str) -> str:
    if value not in ("validation_loss", "exact_match", "accuracy") and not re.fullmatch(CLASS, value):
        raise ValueError("is validation_loss, exact_match, accuracy or module:function, a metric of your own")
    return value


def _device(value: str, info: ValidationInfo) -> str:
    if info.context and not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError("is auto, cpu, cuda or cuda:N, the GPU with that number")
    return value


def _share_or_file(value: Any) -> Any:
    # A union would complain about each of its members; and YAML takes 1e-1 for text.
    share = None if isinstance(value, bool) else value
    if isinstance(value, str):
        try:
            share = float(value)
        except ValueError:
            return value
    if not isinstance(share, int | float) or not 0 < share < 1:
        raise ValueError("is a share of the training rows, over 0 and under 1, or a file or data set")
    return share


Usd = Annotated[int, BeforeValidator(parse_usd), Field(gt=0), PlainSerializer(_exact)]
MachinePrice = Annotated[Rate, BeforeValidator(_rate), PlainSerializer(str)]
Choices = Annotated[tuple[T, ...], BeforeValidator(_listed), Field(min_length=1), AfterValidator(_once_each)]
Share = Annotated[float, Field(gt=0, lt=1)]
Part = Annotated[Share | str, BeforeValidator(_share_or_file)]
Slots = Annotated[int | Literal["auto"], BeforeValidator(_slots)]
Rungs = Annotated[tuple[Share, ...] | str, BeforeValidator(_rungs)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataSpec(_Section):
    """Rows of prompt/completion, messages or text: JSONL, CSV, Parquet, or a hub data set."""

    train: str
    validation: Part = 0.1  # a share of train, or a file: chooses
    test: Part = 0.1  # a share of train, or a file: read by the endgame alone
    max_tokens: int = Field(default=1024, ge=8)
    retention: str | None = None  # a file of general text or tasks: how much of it training unlearns


class MachineSpec(_Section):
    """What is rented, what it costs, and when its meter runs."""

    gpu: str | None = None  # looked up in the price list
    provider: str | None = None
    gpu_count: int = Field(default=1, ge=1)  # of the machine that is rented
    price: MachinePrice | None = None  # wins over the list: $1.29/hour, $0.32/kWh with watts, or $0.48/Mtok
    watts: int | None = Field(default=None, ge=1)  # what your own machine draws, for a price a kWh
    market: Literal["on_demand", "spot"] = "on_demand"
    on_demand: MachinePrice | None = None  # a spot machine's ceiling: holds are made at it
    minimum_seconds: int | None = Field(default=None, ge=0)  # the least that is billed; None: as listed, else nothing
    quantum_seconds: int | None = Field(default=None, ge=1)  # what is billed is a multiple; None: as listed, else exact
    billed_from: Literal["launch", "boot"] = "launch"
    stop_command: str | None = None
    device: Annotated[str, AfterValidator(_device)] = "auto"
    threads: int | None = Field(default=None, ge=1)  # CPU threads of the worker
    slots: Slots = "auto"  # LoRA trials that train at once on one worker; auto: 1 on a CPU, what a probe finds on a GPU
    timings: str | None = None  # a file of seconds a token that replaces the clock: rehearsals and tests

    @model_validator(mode="after")
    def _priced(self) -> MachineSpec:
        if self.gpu is None and self.price is None:
            raise ValueError("needs `gpu` (a listed one, see `sweep prices`) or `price` (such as $1.29/hour)")
        unit = self.price.unit if self.price else "hour"
        if (unit == "kWh") != (self.watts is not None):
            raise ValueError("a price a kWh needs `watts`, what the machine draws, and `watts` needs a price a kWh")
        if self.on_demand is not None and (self.market != "spot" or self.on_demand.unit != "hour"):
            raise ValueError("`on_demand` is the hourly ceiling of a spot machine's price; it needs market: spot")
        if self.market == "spot" and (unit != "hour" or (self.gpu is None and self.on_demand is None)):
            raise ValueError("market: spot needs `on_demand`, the ceiling of its price, or a listed `gpu`")
        if unit == "Mtok" and (self.timings or self.minimum_seconds or self.quantum_seconds):
            raise ValueError("a price a million tokens has no timings, minimum_seconds or quantum_seconds")
        if unit == "Mtok" and self.billed_from == "boot":
            raise ValueError("a price a million tokens is not billed from the boot: a machine that waits costs nothing")
        return self


class BudgetSpec(_Section):
    """The hard cap over everything the study spends, and what of it the search must leave."""

    cap: Usd
    # For the endgame; not given, it is a quarter of the cap where the endgame trains anything, else 0.
    reserve: Annotated[int, BeforeValidator(parse_usd), Field(ge=0), PlainSerializer(_exact)] = 0

    @model_validator(mode="after")
    def _something_to_search_with(self) -> BudgetSpec:
        if self.reserve >= self.cap:
            raise ValueError(f"a reserve of {_exact(self.reserve)} leaves nothing of {_exact(self.cap)} to search with")
        return self


class RangeSpec(_Section):
    """A continuous range, both ends included."""

    low: float = Field(gt=0)
    high: float = Field(gt=0)
    log: bool = True

    @model_validator(mode="after")
    def _ordered(self) -> RangeSpec:
        if self.low > self.high:
            raise ValueError(f"low {self.low:g} is over high {self.high:g}")
        return self


class FirstSpec(_Section):
    """A configuration that is tried before others; what it leaves out is taken from the priors."""

    method: Method = "lora"
    rank: int | None = None
    alpha: float | None = None
    targets: Targets | None = None
    learning_rate: float | None = None
    batch_size: int | None = None


class SearchSpec(_Section):
    """The space, the length of the longest run, how trials are chosen and how they are compared on the way."""

    method: Choices[Method] = ("lora",)
    rank: Choices[Annotated[int, Field(ge=1, le=1024)]] = (4, 8, 16, 32, 64)
    alpha: Choices[Annotated[float, Field(gt=0)]] = (8, 16, 32, 64, 128)
    targets: Choices[Targets] = ("attention", "mlp", "all-linear")
    # LoRA's; full training's is a tenth of it, also where nothing else is searched.
    learning_rate: RangeSpec | Choices[Annotated[float, Field(gt=0)]] = RangeSpec(low=1e-5, high=5e-3)
    batch_size: Choices[Annotated[int, Field(ge=1)]] = (4, 8, 16)
    epochs: float = Field(default=1.0, gt=0)  # the longest run; a part of an epoch is fine
    trials: int | None = Field(default=None, ge=1)  # at most this many; None: what the cap pays for
    live: int = Field(default=4, ge=1)  # trials that take turns; in a pack a quarter more than there are slots
    rungs: Rungs = "auto"  # shares of the longest run at which trials are compared, or a policy
    eta: int = Field(default=2, ge=2)  # one in eta goes on from a rung, with promote: halving
    promote: Literal["curves", "halving"] = "curves"  # who goes on: as a model of the curves says, or one in eta
    # Of LoRA and full training: the same dollars each, or as each next trial promises.
    balance: Literal["dollars", "promise"] = "dollars"
    warmup: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    precision: Precision = "bf16"  # of LoRA's products with the frozen base; what is confirmed is trained in bf16
    sampler: Annotated[str, BeforeValidator(_sampler)] = "curves"  # where the priors leave the choice
    priors: str = Field(default="default", min_length=1)  # default, none, or a file that changes sweep/priors.yaml
    # Earlier studies of the database whose best configurations are tried first; auto: those of a similar model or data.
    warm_start: Annotated[tuple[str, ...] | str, BeforeValidator(_warm_start)] = "auto"
    first: tuple[FirstSpec, ...] | None = None  # tried before others; None: the priors' known-good configurations

    @model_validator(mode="after")
    def _rising(self) -> SearchSpec:
        if not isinstance(self.rungs, str) and list(self.rungs) != sorted(set(self.rungs)):
            raise ValueError(f"rungs must rise: {list(self.rungs)}")
        return self

    @model_validator(mode="after")
    def _precise(self) -> SearchSpec:
        if self.precision != "bf16" and "full" in self.method:
            raise ValueError(f"precision {self.precision} is for LoRA alone: write bf16, or method: [lora]")
        return self

    @field_validator("first")
    @classmethod
    def _in_the_space(cls, first: tuple[FirstSpec, ...] | None, info: ValidationInfo) -> tuple[FirstSpec, ...] | None:
        for number, wanted in enumerate(first or ()):
            for key, value in wanted.model_dump(exclude_none=True).items():
                if wanted.method == "full" and key in {"rank", "alpha", "targets"}:
                    raise ValueError(f"number {number + 1}: full-parameter training has no {key}")
                allowed = info.data.get(key)  # absent if it was refused itself
                if key == "learning_rate" and wanted.method == "full":
                    allowed = full_rates(allowed) if allowed is not None else None
                if isinstance(allowed, RangeSpec) and not _between(value, allowed):
                    where = f"search.{key}, {allowed.low:g} to {allowed.high:g}"
                    raise ValueError(f"number {number + 1}: {key} {value:g} is outside {where} for {wanted.method}")
                if isinstance(allowed, tuple) and not any(_same(value, choice) for choice in allowed):
                    raise ValueError(f"number {number + 1}: {key} {value} is not among search.{key}, {list(allowed)}")
        return first


FULL_RATE_RATIO = 0.1


def full_rates(rates: RangeSpec | tuple[float, ...]) -> RangeSpec | tuple[float, ...]:
    """Full-parameter training's learning rates: a tenth of LoRA's.

    Schulman et al., "LoRA Without Regret", 2025: the best LoRA rate is about ten times the best full rate over 14
    models.
    """
    if isinstance(rates, RangeSpec):
        return RangeSpec(low=rates.low * FULL_RATE_RATIO, high=rates.high * FULL_RATE_RATIO, log=rates.log)
    return tuple(rate * FULL_RATE_RATIO for rate in rates)


def _same(value: Any, choice: Any) -> bool:
    return value == choice or (isinstance(value, float) and math.isclose(value, choice, rel_tol=1e-9))


def _between(value: float, allowed: RangeSpec) -> bool:
    return allowed.low <= value <= allowed.high or _same(value, allowed.low) or _same(value, allowed.high)


class ObjectiveSpec(_Section):
    """What chooses among trials that came to their end. Rungs judge by loss, over the choices where there are some."""

    metric: Annotated[str, AfterValidator(_known_metric)] = "validation_loss"
    choices: Annotated[tuple[str, ...], Field(min_length=2)] | None = None  # of accuracy; None: those of the train rows
    max_new_tokens: int = Field(default=64, ge=1, le=4096)  # that are generated for a metric on text

    @model_validator(mode="after")
    def _chosen_from(self) -> ObjectiveSpec:
        if self.choices is not None and self.metric != "accuracy":
            raise ValueError(f"`choices` are for the metric accuracy, not for {self.metric}")
        return self


class FullSpec(_Section):
    """How full-parameter trials are trained; it changes what they cost and need, hardly what they learn."""

    optimizer: Literal["adamw", "adamw-8bit"] = "adamw"  # 8-bit: a quarter of the moments, by bitsandbytes or torchao
    checkpointing: bool | Literal["auto"] = "auto"  # of activations: auto where it would not fit without
    processes: int = Field(default=1, ge=1)  # GPUs that share one trial


class EndgameSpec(_Section):
    """What the reserve buys: the leading configurations again, under seeds of their own, judged on the test rows."""

    seeds: int = Field(default=3, ge=0, le=20)  # of each confirmed configuration; 0: nothing is confirmed
    configurations: int = Field(default=3, ge=1, le=20)  # of each method that enter the race
    ranks: bool = False  # the best configuration of each LoRA rank enters too
    finale: bool = True  # choose what is handed over; with finale_length, train the winner in full before
    finale_length: float | None = Field(default=None, gt=0)  # epochs; None: search.epochs, which it has had already

    @model_validator(mode="after")
    def _confirming(self, info: ValidationInfo) -> EndgameSpec:
        if info.context and self.seeds == 1:
            raise ValueError("seeds: 1 confirms nothing, since luck shows under two at least; write 2 or more, or 0")
        return self

    @property
    def trains(self) -> bool:
        """Whether anything is trained after the search."""
        return self.seeds > 0 or (self.finale and self.finale_length is not None)


class PatienceSpec(_Section):
    """Stop when the best trained trial was not improved on for so long, whichever comes first."""

    trials: int | None = Field(default=None, ge=1)  # that trained since then, to whatever decision
    dollars: Usd | None = None  # of training since then
    tolerance: float = Field(default=0.002, ge=0, lt=1)  # relative: less is no improvement; two seeds differ by as much

    @model_validator(mode="after")
    def _some_limit(self) -> PatienceSpec:
        if self.trials is None and self.dollars is None:
            object.__setattr__(self, "trials", PATIENCE)  # frozen, but nobody has seen it yet
        return self


class UtilitySpec(_Section):
    """Stop when nothing that can be paid is expected to be worth its price."""

    dollars_per_percent: Usd  # what lowering the best loss by one percent is worth to you


class StopSpec(_Section):
    """When the search stops although there is money left; neither: never."""

    patience: PatienceSpec | None = None
    utility: UtilitySpec | None = None


class Spec(_Section):
    """One study, complete."""

    study: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")
    model: str
    data: DataSpec
    machine: MachineSpec
    budget: BudgetSpec
    search: SearchSpec = SearchSpec()
    objective: Annotated[ObjectiveSpec, BeforeValidator(_metric)] = ObjectiveSpec()
    full: FullSpec = FullSpec()
    endgame: EndgameSpec = EndgameSpec()
    stop: Annotated[StopSpec, BeforeValidator(_stop)] = StopSpec()  # or off, patience
    seed: int = Field(default=0, ge=0, lt=2**32)

    @model_validator(mode="after")
    def _reserved(self) -> Spec:
        if self.endgame.trains and "reserve" not in self.budget.model_fields_set:
            budget = self.budget.model_copy(update={"reserve": int(self.budget.cap * RESERVE_SHARE)})
            object.__setattr__(self, "budget", budget)  # frozen, but nobody has seen it yet
        return self

    @model_validator(mode="after")
    def _in_full(self) -> Spec:
        length, epochs = self.endgame.finale_length, self.search.epochs
        if length is not None and length < epochs:
            raise ValueError(f"endgame.finale_length {length:g} is shorter than the search's longest run, {epochs:g}")
        return self

    def resolved(self) -> dict[str, Any]:
        """Returns the spec with every default filled in, as plain JSON; Spec.model_validate reads it back."""
        return self.model_dump(mode="json")


def load(path: Path, overrides: typing.Sequence[str] = (), study: str | None = None, cap: str | None = None) -> Spec:
    """Reads a spec file; `overrides` are `--set` texts (`search.rank=[8,16]`). Raises SpecError, one line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise SpecError(f"there is no spec file {path}", "start from examples/quickstart.yaml") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path} cannot be read: {error}") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise SpecError(f"{path}{where}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(values, dict):
        raise SpecError(f"{path}: not a spec; it needs at least model, data, machine and budget")
    if twice := repeated(node):
        name, first, again = twice
        raise SpecError(f"{path}, line {again}: {name} stands in line {first} already", "keep one of them")
    values.setdefault("study", path.stem)
    if study is not None:
        values["study"] = study
    lines: dict[tuple[str, ...], int | str] = dict(lines_of(node))
    flags = [(override, f"--set {override}") for override in overrides]
    for override, flag in [*flags, *([(f"budget.cap={cap}", f"--cap {cap}")] if cap is not None else [])]:
        key = _set(values, override)
        lines = {one: line for one, line in lines.items() if one[: len(key)] != key} | {key: flag}
    return validate(values, str(path), lines)


def validate(values: dict[str, Any], where: str, lines: Mapping[tuple[str, ...], int | str] | None = None) -> Spec:
    """Checks plain values. Raises SpecError with the first thing that is wrong, and in which line or flag."""
    try:
        return Spec.model_validate(values, context=NEW)
    except ValidationError as error:
        raise SpecError(*explain(foremost(error.errors()), where, lines or {}, Spec)) from error
    except MoneyError as error:
        raise SpecError(f"{where}: {error}") from error


def _set(values: dict[str, Any], override: str) -> tuple[str, ...]:
    """Carries out one override; returns its key, by parts."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise SpecError(f"--set {override!r}: write it as search.rank=[8,16]")
    *parents, last = key.split(".")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SpecError(f"--set {override!r}: the value is not YAML") from error
    section = values
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            whole = f"set the whole: --set '{parent}={{..., {last}: {text}}}'"
            raise SpecError(f"--set {override!r}: the file writes {parent} as one value, {str(section)[:40]!r}", whole)
    section[last] = value
    return (*parents, last)
