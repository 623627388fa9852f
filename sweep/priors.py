"""What is known before anything was measured: priors as data, each with its source, and what of them a study uses.

`priors.yaml` beside this file is the default; a user's file of the same shape replaces what it names. `select` turns it
into a study's own `Priors`, by the model's width and family and inside the study's space; they are stored with the
study's facts, so that a resumed study does not depend on any file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from sweep import space
from sweep.errors import SpecError
from sweep.explain import explain, lines_of
from sweep.spec import Method, RangeSpec, SearchSpec, Targets

CLOSE = 1e-9  # relative; rates that are written differently are the same


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_Part):
    """Who said it, when and where."""

    authors: str
    year: int
    title: str
    identifier: str


class FamilyRate(_Part):
    """How the learning rate of one family of models depends on the width."""

    model_types: tuple[str, ...] = ()  # as transformers names them
    exponent: float
    spread: float = Field(gt=1)


class RatePrior(_Part):
    """LoRA's rate: at_reference * (reference_width / hidden_size) ** exponent, at the reference alpha and batch."""

    at_reference: float = Field(gt=0)
    reference_width: int = Field(gt=0)
    families: dict[str, FamilyRate]
    other: FamilyRate
    unknown_width: int = Field(gt=0)
    full_ratio: float = Field(gt=0)
    short_steps: int = Field(ge=0)
    short_factor: float = Field(gt=0)
    reference_alpha: float = Field(gt=0)
    alpha_exponent: float
    reference_batch: float = Field(gt=0)
    batch_exponent: float
    sources: tuple[str, ...] = ()


class Centre(_Part):
    """A likely value, and the factor within which two of three lie."""

    center: float = Field(gt=0)
    spread: float = Field(gt=1)
    sources: tuple[str, ...] = ()


class TargetsPrior(_Part):
    """How likely each kind of target modules is."""

    weights: dict[Targets, float]
    sources: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _likely(self) -> TargetsPrior:
        if any(weight < 0 for weight in self.weights.values()) or not sum(self.weights.values()):
            raise ValueError(f"weights are not negative and one is positive: {self.weights}")
        return self


class AlphaRule(_Part):
    """Alpha as a multiple of the rank, or as a number."""

    times_rank: float | None = Field(default=None, gt=0)
    fixed: float | None = Field(default=None, gt=0)
    weight: float = Field(default=1.0, gt=0)

    @model_validator(mode="after")
    def _one(self) -> AlphaRule:
        if (self.times_rank is None) == (self.fixed is None):
            raise ValueError("a rule has `times_rank` or `fixed`")
        return self

    def center(self, rank: int) -> float:
        """The alpha that the rule gives to a rank."""
        return self.fixed if self.fixed is not None else (self.times_rank or 0.0) * rank


class AlphaPrior(_Part):
    """Which rules are in use, and how closely they are followed."""

    rules: tuple[AlphaRule, ...] = Field(min_length=1)
    spread: float = Field(gt=1)
    sources: tuple[str, ...] = ()


class KnownValues(_Part):
    """A known-good configuration."""

    method: Method = "lora"
    rank: int | None = None
    alpha: float | None = None
    targets: Targets | None = None
    learning_rate: float | None = Field(default=None, gt=0)
    times_prior: float = Field(default=1.0, gt=0)
    batch_size: int | None = None


class Known(_Part):
    """A known-good configuration and who says so."""

    why: str
    values: KnownValues
    sources: tuple[str, ...] = ()


class PriorFile(_Part):
    """The whole file."""

    sources: dict[str, Source] = {}
    learning_rate: RatePrior
    rank: Centre
    targets: TargetsPrior
    alpha: AlphaPrior
    batch_size: Centre
    first: tuple[Known, ...]

    @model_validator(mode="after")
    def _sourced(self) -> PriorFile:
        for name, part in [*((n, getattr(self, n)) for n in type(self).model_fields), *self._firsts()]:
            for key in getattr(part, "sources", ()) if name != "sources" else ():
                if key not in self.sources:
                    raise ValueError(f"{name} cites {key}, which is not among sources")
        return self

    def _firsts(self) -> list[tuple[str, Known]]:
        return [(f"first.{number}", known) for number, known in enumerate(self.first)]


class Priors(_Part):
    """The priors of one study, complete: what `proposals.Guide` draws from. Stored as JSON in the study's facts."""

    guided: bool  # False: only `first` is tried, then the sampler is on its own
    lora_rate: float  # at the reference alpha and batch, in a run that is not short
    full_rate: float
    rate_spread: float
    short_steps: int
    short_factor: float
    reference_alpha: float
    alpha_exponent: float
    reference_batch: float = 1.0  # a study that was launched before batches counted goes on as it began
    batch_exponent: float = 0.0
    rank: Centre
    targets: TargetsPrior
    alpha: AlphaPrior
    batch_size: Centre
    first: tuple[dict[str, Any], ...]  # whole configurations by Optuna's names, inside the study's space
    notes: tuple[str, ...]  # what was moved or left out, in words

    def rate(self, chosen: Mapping[str, Any], examples: int) -> float:
        """The likeliest learning rate of a configuration whose run has so many examples."""
        batch: float = (chosen["batch_size"] / self.reference_batch) ** self.batch_exponent
        if chosen["method"] == "full":
            return self.full_rate * batch
        short = examples / chosen["batch_size"] < self.short_steps
        scale: float = (self.reference_alpha / chosen["lora_alpha"]) ** self.alpha_exponent
        return self.lora_rate * batch * scale * (self.short_factor if short else 1.0)


def load(path: Path | None = None) -> PriorFile:
    """Reads the default priors, changed by those in `path` if one is given. Raises SpecError, one line."""
    default: dict[str, Any] = yaml.safe_load(resources.files("sweep").joinpath("priors.yaml").read_text("utf-8"))
    if path is None:
        return PriorFile.model_validate(default)
    try:
        text = path.read_text(encoding="utf-8")
        node, given = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except FileNotFoundError as error:
        raise SpecError(f"search.priors: there is no file {path}", "or write `default` or `none`") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"search.priors: {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise SpecError(f"{path}{where}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(given, dict):
        raise SpecError(f"{path}: no priors in it", f"its keys are {', '.join(PriorFile.model_fields)}")
    try:
        return PriorFile.model_validate(_merged(default, given))
    except ValidationError as error:
        raise SpecError(*explain(error.errors()[0], str(path), lines_of(node), PriorFile)) from error


def _merged(default: Any, given: Any) -> Any:
    if not (isinstance(default, dict) and isinstance(given, dict)):
        return given
    return default | {key: _merged(default.get(key), value) for key, value in given.items()}


def select(search: SearchSpec, facts: Mapping[str, Any], examples: int) -> Priors | None:
    """Returns the priors of a study, None if it wants none; `facts` may have `hidden_size` and `model_type`.

    `examples` are those of the longest run. Raises SpecError.
    """
    guided = search.priors != "none"
    if not guided and not search.first:
        return None
    file = load(None if search.priors in {"default", "none"} else Path(search.priors))
    known, rates = _family(file.learning_rate, facts), file.learning_rate
    width = facts.get("hidden_size") or rates.unknown_width
    lora_rate = rates.at_reference * (rates.reference_width / width) ** known.exponent
    notes = [] if facts.get("hidden_size") else [f"the model's width is unknown: taken for {width}"]
    priors = Priors(
        guided=guided,
        lora_rate=lora_rate,
        full_rate=lora_rate * rates.full_ratio,
        rate_spread=known.spread,
        short_steps=rates.short_steps,
        short_factor=rates.short_factor,
        reference_alpha=rates.reference_alpha,
        alpha_exponent=rates.alpha_exponent,
        reference_batch=rates.reference_batch,
        batch_exponent=rates.batch_exponent,
        rank=file.rank,
        targets=file.targets,
        alpha=file.alpha,
        batch_size=file.batch_size,
        first=(),
        notes=(),
    )
    first: list[dict[str, Any]] = []
    for label, values in _wanted(search, file, guided):
        chosen, moved = inside(values, priors, search, examples)
        repeats = chosen in first
        if moved and search.first is None:
            notes.append(f"{label}: {', '.join(moved)}" + (", which was there already: left out" if repeats else ""))
        first += [] if repeats else [chosen]
    return priors.model_copy(update={"first": tuple(first), "notes": tuple(notes)})


def of(facts: Mapping[str, Any]) -> Priors | None:
    """The priors that a study's launch stored with its facts; None if there are none."""
    stored = facts.get("priors")
    return None if stored is None else Priors.model_validate(stored)


def _family(rates: RatePrior, facts: Mapping[str, Any]) -> FamilyRate:
    return next((f for f in rates.families.values() if facts.get("model_type") in f.model_types), rates.other)


def _wanted(search: SearchSpec, file: PriorFile, guided: bool) -> list[tuple[str, KnownValues]]:
    """What is to be tried first, with a label for the log. A known-good one of a method not searched is none."""
    if search.first is not None:
        given = [KnownValues.model_validate(first.model_dump(exclude_none=True)) for first in search.first]
        return [(f"search.first.{number}", values) for number, values in enumerate(given)]
    own = [(number, known) for number, known in enumerate(file.first) if known.values.method in search.method]
    return [(f"known-good {number} ({known.why})", known.values) for number, known in own] if guided else []


def inside(values: KnownValues, priors: Priors, search: SearchSpec, examples: int) -> tuple[dict[str, Any], list[str]]:
    """A whole configuration in the study's space, as near to the known one as can be, and what had to be moved."""
    chosen: dict[str, Any] = {"method": values.method}
    moved: list[str] = []

    def near(key: str, value: float, options: tuple[Any, ...]) -> Any:
        best = min(options, key=lambda option: (abs(math.log(option / value)), option))
        if not math.isclose(best, value, rel_tol=CLOSE):
            moved.append(f"{key} {value:g} is outside the space, {best:g} is taken")
        return best

    if values.method == "lora":
        rank = values.rank if values.rank is not None else priors.rank.center
        chosen["lora_rank"] = near("rank", rank, search.rank)
        rule = max(priors.alpha.rules, key=lambda r: r.weight)
        alpha = values.alpha if values.alpha is not None else rule.center(chosen["lora_rank"])
        chosen["lora_alpha"] = near("alpha", alpha, search.alpha)
        likeliest = max(search.targets, key=lambda t: priors.targets.weights.get(t, 0.0))
        chosen["lora_targets"] = values.targets if values.targets in search.targets else likeliest
        if values.targets not in {None, chosen["lora_targets"]}:
            moved.append(f"targets {values.targets} is outside the space, {likeliest} is taken")
    batch = values.batch_size if values.batch_size is not None else priors.batch_size.center
    chosen["batch_size"] = near("batch_size", batch, search.batch_size)
    rate = values.learning_rate or priors.rate(chosen, examples) * values.times_prior
    rates = space.rates(values.method, search)
    if isinstance(rates, RangeSpec):
        inside = min(max(rate, rates.low), rates.high)
        if not math.isclose(inside, rate, rel_tol=CLOSE):
            moved.append(f"learning_rate {rate:.2g} is outside the space, {inside:.2g} is taken")
    else:
        inside = near("learning_rate", rate, rates)
    chosen[f"{values.method}_learning_rate"] = inside
    return chosen, moved
