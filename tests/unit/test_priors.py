"""Priors as data: what the file says, what of it a study uses, and how a wrong one is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from sweep import priors, space
from sweep.errors import SpecError
from sweep.spec import RangeSpec, SearchSpec, load

LLAMA = {"hidden_size": 2048, "model_type": "llama"}
SPEC = """\
model: m
data:
  train: t.jsonl
machine:
  price: $1.29/hour
budget:
  cap: $200
search:
  rank: [8, 16]
  first:
"""


def selected(search: SearchSpec, examples: int = 4000, facts: dict | None = None) -> priors.Priors:
    """The priors of a study."""
    found = priors.select(search, LLAMA if facts is None else facts, examples)
    assert found is not None
    return found


def test_every_prior_names_its_source() -> None:
    """Proves that each section and each known-good configuration cites a source, and that none is cited for nothing."""
    file = priors.load()
    parts = [file.learning_rate, file.rank, file.targets, file.alpha, file.batch_size, *file.first]
    assert all(part.sources for part in parts)
    assert {key for part in parts for key in part.sources} == set(file.sources)
    assert 3 <= sum(known.values.method == "lora" for known in file.first) <= 4


@pytest.mark.parametrize(
    ("model_type", "width", "rate"),
    [("llama", 2048, 4.9e-4), ("llama", 4096, 2.9e-4), ("llama", 8192, 1.66e-4), ("qwen2", 896, 5.3e-4),
     ("qwen3", 2560, 4.9e-4), ("qwen3", 4096, 4.7e-4)],
)  # fmt: skip
def test_rates_are_the_published_ones(model_type: str, width: int, rate: float) -> None:
    """Proves the formula on the rates that tinker-cookbook's get_lr gave for models of two families."""
    found = selected(SearchSpec(), facts={"hidden_size": width, "model_type": model_type})
    assert found.lora_rate == pytest.approx(rate, rel=0.02) and found.rate_spread == 3
    assert found.full_rate == pytest.approx(rate / 10, rel=0.02)


def test_an_unknown_model_has_a_wider_prior() -> None:
    """Proves that a family without a calibration, and a model of unknown width, are trusted less and said so."""
    other = selected(SearchSpec(), facts={"hidden_size": 768, "model_type": "gpt2"})
    assert other.rate_spread > 3 and not any("width" in note for note in other.notes)
    assert "width is unknown" in selected(SearchSpec(), facts={}).notes[0]


def test_rates_depend_on_alpha_on_the_batch_and_on_the_length() -> None:
    """Proves that alpha, the batch and the rate are not independent, and that a run of few steps wants more of LoRA's
    rate. A study that was launched before batches counted keeps its priors."""
    found = selected(SearchSpec())
    lora = {"method": "lora", "lora_alpha": 32, "batch_size": 8}
    assert found.rate(lora | {"lora_alpha": 128}, 4000) == pytest.approx(found.rate(lora, 4000) / 2)
    assert found.rate(lora, 8 * 99) == pytest.approx(1.5 * found.rate(lora, 8 * 100))
    assert found.rate(lora | {"batch_size": 32}, 4000) == pytest.approx(2 * found.rate(lora, 4000))
    full = {"method": "full", "batch_size": 8}
    assert found.rate(full, 80) == found.rate(full, 8000) == found.full_rate
    assert found.rate(full | {"batch_size": 2}, 8000) == pytest.approx(found.full_rate / 2)
    stored = found.model_dump(exclude={"reference_batch", "batch_exponent"})
    assert priors.Priors.model_validate(stored).rate(full | {"batch_size": 2}, 8000) == found.full_rate


def test_known_good_ones_are_moved_into_the_space_and_it_says_so() -> None:
    """Proves that what lies outside the user's space goes to its nearest point, once, with a word about each."""
    narrow = SearchSpec(rank=(64,), targets=("mlp",), learning_rate=RangeSpec(low=1e-5, high=1e-4))
    found = selected(narrow)
    assert {(c["lora_rank"], c["lora_targets"]) for c in found.first} == {(64, "mlp")}
    assert all(c["lora_learning_rate"] == 1e-4 for c in found.first)
    assert len({str(c) for c in found.first}) == len(found.first)
    assert all("rank 16 is outside the space, 64 is taken" in note for note in found.notes[:2])
    listed = selected(SearchSpec(learning_rate=(1e-4, 5e-4), method=("full", "lora")))
    assert {c.get("full_learning_rate") for c in listed.first} == {None, 5e-5}
    wide = SearchSpec(rank=(8, 16), alpha=(16, 32), batch_size=(8, 16))
    assert selected(wide).notes == () and len(selected(wide).first) == 3


def test_a_file_of_ones_own_changes_what_it_names(tmp_path: Path) -> None:
    """Proves that a user's file is merged key by key, and that `none` is none."""
    mine = tmp_path / "mine.yaml"
    mine.write_text("learning_rate: {at_reference: 1.0e-3}\nrank: {center: 64}\nfirst: []\n")
    found, default = selected(SearchSpec(priors=str(mine))), selected(SearchSpec())
    assert found.lora_rate == pytest.approx(2 * default.lora_rate) and found.first == ()
    assert (found.rank.center, found.rank.spread, found.targets) == (64, default.rank.spread, default.targets)
    assert priors.select(SearchSpec(priors="none"), LLAMA, 4000) is None
    stored = yaml.safe_load(yaml.safe_dump(found.model_dump(mode="json")))
    assert priors.of({"priors": stored}) == found and priors.of({}) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rank:\n  centre: 3\n", r"mine\.yaml, line 2: unknown key rank\.centre; did you mean center\?"),
        ("rank:\n  spread: 1\n", r"mine\.yaml, line 2: rank\.spread: input should be greater than 1"),
        ("alpha:\n  rules: [{times_rank: 2, fixed: 3}]\n", r"line 2: alpha\.rules\.0: a rule has"),
        ("targets:\n  weights: {all-linear: 0, mlp: 0, attention: 0}\n", r"line 1: targets: weights are not negative"),
        ("rank: {sources: [nobody]}\n", r"mine\.yaml: .*rank cites nobody"),
        (
            "first:\n  - {why: mine, values: {rnk: 3}}\n",
            r"line 1: unknown key first\.0\.values\.rnk; did you mean rank",
        ),
        ("[1\n", r"mine\.yaml, line 2: not YAML"),
        ("", r"mine\.yaml: no priors in it"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    """Proves that each mistake in a file of priors names file, line and key."""
    mine = tmp_path / "mine.yaml"
    mine.write_text(text)
    with pytest.raises(SpecError, match=message) as caught:
        priors.select(SearchSpec(priors=str(mine)), LLAMA, 4000)
    assert "\n" not in str(caught.value)
    with pytest.raises(SpecError, match="there is no file"):
        priors.load(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("first", "message"),
    [
        ("[{rank: 12}]", r"line 10: search\.first: number 1: rank 12 is not among search\.rank, \[8, 16\]"),
        ("[{rank: 8}, {learning_rate: 1}]", r"number 2: learning_rate 1 is outside search\.learning_rate, 1e-05 to"),
        ("[{method: full}]", r"number 1: method full is not among search\.method"),
        ("[{rnk: 8}]", r"line 10: unknown key search\.first\.0\.rnk; did you mean rank\?"),
        ("3", r"line 10: search\.first"),
    ],
)
def test_first_is_checked_against_the_space(tmp_path: Path, first: str, message: str) -> None:
    """Proves that a configuration to try first that is outside the space is refused, naming key and line."""
    path = tmp_path / "spec.yaml"
    path.write_text(SPEC.replace("first:\n", f"first: {first}\n"))
    with pytest.raises(SpecError, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_first_replaces_the_known_good_ones_and_is_filled_in() -> None:
    """Proves search.first: given keys are kept, the others are the priors', and it works without priors too."""
    search = SearchSpec.model_validate({"rank": [4, 16], "first": [{"rank": 4, "learning_rate": 3e-4}, {}]})
    one, two = selected(search).first
    assert (one["lora_rank"], one["lora_alpha"], one["lora_learning_rate"]) == (4, 8, 3e-4)
    assert (two["lora_rank"], two["lora_targets"]) == (16, "all-linear")
    alone = selected(search.model_copy(update={"priors": "none"}))
    assert not alone.guided and alone.first == (one, two)
    full = SearchSpec.model_validate({"method": ["full"], "first": [{"method": "full", "learning_rate": 1e-6}]})
    lowest = selected(full).first[0]
    assert lowest == {"method": "full", "batch_size": 16, "full_learning_rate": pytest.approx(1e-6)}
    assert lowest["full_learning_rate"] >= space.rates("full", full).low, "a sampler refuses what is just outside"
