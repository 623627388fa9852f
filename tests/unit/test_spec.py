"""A spec that is wrong is refused in one line that names key and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from sweep.errors import SpecError
from sweep.spec import Spec, load, validate

TEXT = """\
model: m
data:
  train: t.jsonl
machine:
  price: $1.29/hour
budget:
  cap: $200
search:
  rank: 8
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A minimal spec."""
    file = tmp_path / "words.yaml"
    file.write_text(TEXT)
    return file


def test_defaults_are_filled_in_and_survive_storage(path: Path) -> None:
    """Proves that only model, data, machine and cap are needed, and that the stored copy reads back alike."""
    spec = load(path)
    assert (spec.study, spec.budget.cap, spec.machine.price) == ("words", 200_000_000, (1_290_000, "hour"))
    assert spec.search.rank == (8,) and spec.search.live == 4
    assert Spec.model_validate(spec.resolved()) == spec


def test_overrides_win(path: Path) -> None:
    """Proves --set, --cap and --study; numbers such as 1e-4, which YAML reads as text, become numbers."""
    spec = load(path, ["search.rank=[8,16]", "search.learning_rate={low: 1e-4, high: 1e-2}"], "other", "$5")
    assert (spec.study, spec.budget.cap, spec.search.rank) == ("other", 5_000_000, (8, 16))
    assert spec.search.learning_rate.low == 1e-4
    assert [load(path, [f"machine.slots={n}"]).machine.slots for n in ("auto", 1, 64)] == ["auto", 1, 64]


def test_a_stored_spec_is_read_under_the_rules_of_its_time(path: Path) -> None:
    """Proves that what an earlier version launched can be listed and resumed, though nobody may launch it now."""
    stored = load(path).resolved()
    stored["endgame"]["seeds"] = 1
    stored["search"]["rank"] = [8, 8]
    stored["machine"]["device"] = "gpu"
    assert Spec.model_validate(stored).search.rank == (8, 8)
    with pytest.raises(SpecError):
        validate(stored, "here")


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("stop.utility={}", "one percent is worth"),
        ("search.learning_rate={low: 1.0e-4}", "a range has low and high"),
        ("endgame=null", "seeds, configurations, ranks"),
        ("budget={}", "everything has a default but"),
    ],
)
def test_what_is_missing_is_said_with_what_would_do(path: Path, override: str, hint: str) -> None:
    """Proves that the remedy is the part's own."""
    with pytest.raises(SpecError) as caught:
        load(path, [override])
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.learning_rate=-1e-4", r"search\.learning_rate\.0: input should be greater than 0 \(given: '-1e-4'\)"),
        ("search.learning_rate=[1e-4, -3e-4]", r"search\.learning_rate\.1: input should be greater than 0"),
        ("search.learning_rate=.inf", r"input should be a finite number"),
        ("search.epochs=.inf", r"search\.epochs: input should be a finite number"),
        ("search.rnk=3", r"^--set search\.rnk=3: unknown key search\.rnk; did you mean rank\?"),
        ("modl=3", r"unknown key modl; did you mean model\?"),
        ("budget.cap=$0", r"^--set budget\.cap=\$0: budget\.cap: .*greater than 0"),
        ("machine.price=-1", r"^--set machine\.price=\-1: machine\.price: a price must be positive"),
        ("search.targets=[atention]", r"search\.targets\.0: input should be 'attention', 'mlp' or 'all-linear'"),
        ("search.learning_rate={low: 1, high: 0.1}", r"search\.learning_rate: low 1 is over high 0\.1"),
        ("machine.price=null", r"line 4: machine: needs `gpu`"),
        ("data.validation=1.5", r"data\.validation: is a share of the training rows"),
        ("data.test=null", r"data\.test: is a share of the training rows, over 0 and under 1, or a file"),
        ("stop=nonsense", r"stop: is `off`, `patience`, or a section"),
        ("stop.utility={}", r"stop\.utility\.dollars_per_percent is missing"),
        ("search.learning_rate={low: 1.0e-4}", r"learning_rate\.high is missing"),
        ("objective=f1", r"objective\.metric: is validation_loss, exact_match, accuracy or module:function"),
        ("endgame=null", r"endgame is no section"),
        ("endgame.seeds=1", r"seeds: 1 confirms nothing"),
        ("search.method=[lora, lora]", r"lora stands there twice"),
        ("search.rank=true", r"true and false are no choices"),
        ("machine.device=gpu", r"device: is auto, cpu, cuda or cuda:N"),
        ("search.rungs=[0.2, 0.1]", r"rungs must rise"),
        ("search={precision: fp8, method: [lora, full]}", r"precision fp8 is for LoRA alone: write bf16, or method"),
        ("search.precision=fp16", r"search\.precision: input should be 'bf16' or 'fp8'"),
        (
            "search.rungs=halvng",
            r"^--set search\.rungs=halvng: search\.rungs: is a list of shares .*`hyperband`.* \(given: 'halvng'\)",
        ),
        (
            "search.sampler=tpee",
            r"^--set search\.sampler=tpee: search\.sampler: is `curves`, .* or module:Class.* \(given: 'tpee'\)",
        ),
        ("budget.cap=lots", r"not an amount of dollars"),
        (
            "machine.slots=0",
            r"^--set machine\.slots=0: machine\.slots: is `auto`, or how many LoRA trials .* 1 to 64 \(given: 0\)",
        ),
        ("machine.slots=65", r"1 to 64"),
        ("machine.slots=many", r"1 to 64"),
        ("machine.slots=2.5", r"1 to 64"),
        ("machine.slots=on", r"1 to 64"),
        ("nonsense", r"write it as"),
        ("search.rank.low=3", r"^--set 'search\.rank\.low=3': the file writes rank as one value, '8'"),
    ],
)
def test_errors_name_key_and_line(path: Path, override: str, message: str) -> None:
    """Proves that each mistake is one line that says what, where and what is known."""
    with pytest.raises(SpecError, match=message) as caught:
        load(path, [override])
    assert "\n" not in str(caught.value)


def test_a_mistake_is_where_it_was_made(path: Path, tmp_path: Path) -> None:
    """Proves that a line of the file is blamed for what stands there, and a flag for what it says instead of it."""
    text = path.read_text()
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(text.replace("search:", "search:\n  rungs: halvng", 1))
    number = text[: text.index("search:")].count("\n") + 2
    with pytest.raises(SpecError, match=rf"wrong\.yaml, line {number}: search\.rungs: is a list"):
        load(wrong)
    assert load(wrong, ["search.rungs=halving"]).search.rungs == "halving"
    with pytest.raises(SpecError, match=r"^--cap \$2OO: budget\.cap: '\$2OO' is not an amount"):
        load(path, cap="$2OO")
    with pytest.raises(SpecError, match=r"^--set search=\{ranks: 8\}: unknown key search\.ranks"):
        load(path, ["search={ranks: 8}"])
    with pytest.raises(SpecError, match=r"^--set search\.rank=8,16: ") as caught:
        load(path, ["search.rank=8,16"])
    assert caught.value.hint == "a list is written [8,16]"


def test_a_key_that_stands_there_twice_is_refused(path: Path, tmp_path: Path) -> None:
    """Proves that no second cap or section takes the first one's place unseen, in lists too."""
    text = path.read_text()
    twice = tmp_path / "twice.yaml"
    lines = text.count("\n")
    for more, message in (
        ("budget: {cap: $200}\n", rf"twice\.yaml, line {lines + 1}: budget stands in line \d+ already"),
        ("endgame: {seeds: 2, seeds: 3}\n", r"endgame\.seeds stands in line"),
        ("other:\n- {rank: 4, rank: 8}\n", r"other\.rank stands in line"),
    ):
        twice.write_text(text + more)
        with pytest.raises(SpecError, match=message):
            load(twice)


def test_files_that_are_no_spec(tmp_path: Path) -> None:
    """Proves the messages for a missing, a broken and an empty file."""
    with pytest.raises(SpecError, match="there is no spec file"):
        load(tmp_path / "missing.yaml")
    (tmp_path / "broken.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(SpecError, match=r"line 2: not YAML"):
        load(tmp_path / "broken.yaml")
    (tmp_path / "empty.yaml").write_text("")
    with pytest.raises(SpecError, match="not a spec"):
        load(tmp_path / "empty.yaml")
