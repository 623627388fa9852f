"""Documents and examples cannot drift from the program."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from sweep import pricing
from sweep.cli import VERBS
from sweep.plan import drawn, lengths
from sweep.spec import load

ROOT = Path(__file__).parents[2]


def test_the_command_lines_documentation_is_current() -> None:
    """Proves that docs/cli.md is what `--help` says; `make docs` writes it anew."""
    command = [sys.executable, "-m", "cogapp", "--check", "docs/cli.md"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_command_in_the_readme_exists() -> None:
    """Proves that the README names verbs and make targets that there are."""
    text = (ROOT / "README.md").read_text()
    verbs = set(re.findall(r"^sweep (\w+)", text, flags=re.MULTILINE))
    assert verbs and verbs <= set(VERBS)
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", text, flags=re.MULTILINE)) <= targets


def test_every_file_that_the_documents_name_exists() -> None:
    """Proves that links, to a heading too, and paths in the documents lead somewhere."""
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("[!c]*.md")), ROOT / "CONTRIBUTING.md"):
        text = document.read_text()
        named = set(re.findall(r"`((?:sweep|trainers|budgets|docs|examples)/[\w./-]+)`", text))
        for path in named:
            assert (ROOT / path).exists(), f"{document.name} names {path}"
        for link in re.findall(r"\]\(([^)h][^)]*)\)", text):
            path, _, heading = link.partition("#")
            target = document.parent / path if path else document
            assert target.exists(), f"{document.name} links to {link}"
            if heading:
                headings = re.findall(r"^#+ (.+)", target.read_text(), flags=re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings}
                assert heading in anchors, f"{document.name} links to {link}"


def test_every_test_that_the_faults_name_exists() -> None:
    """Proves that the table of faults names tests that there are, and all of F1 to F26."""
    text = (ROOT / "docs" / "faults.md").read_text()
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    known = set(re.findall(r"def (test_\w+)", sources))
    named = set(re.findall(r"`(test_\w+)`", text))
    assert len(named) > 40 and named <= known, sorted(named - known)
    assert re.findall(r"^\| (F\d+) \|", text, flags=re.MULTILINE) == [f"F{n}" for n in range(1, 27)]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_example_is_a_spec_with_a_price(path: Path) -> None:
    """Proves that each shipped example parses and that its machine has a price."""
    spec = load(path)
    price = pricing.quote(spec)
    assert price.tariff.now > 0 and price.note


def test_the_articles_case_is_planned() -> None:
    """Proves that $200 on one A100 is laid out for a 7B model: a full run costs more than a LoRA run, and fifty first
    comparisons fit many times over."""
    spec = load(ROOT / "examples" / "7b-200usd.yaml")
    splits = {"train": {"rows": 8_000, "tokens": 2_400_000}, "validation": {"rows": 1_000, "tokens": 300_000}}
    facts = {"parameters": 7_615_616_512, "device": "NVIDIA A100-SXM4-80GB", "cores": 16, "data": {"splits": splits}}
    facts["plan"] = lengths(spec.search, splits).__dict__
    plan = drawn(spec, facts, pricing.quote(spec))
    runs = {run.method: run for run in plan.runs}
    assert plan.cap == 200_000_000
    assert runs["lora"].low < runs["lora"].cost < runs["lora"].high
    assert 1.3 < runs["full"].cost / runs["lora"].cost < 1.7, "6N FLOPs a token against 4N"
    assert 50 * plan.first_rung < plan.cap
