"""The arrows between packages, and a command line that answers at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "peft", "datasets", "accelerate")


def loaded(code: str) -> set[str]:
    """Top-level modules in a fresh interpreter after `code`."""
    script = f"{code}\nimport sys; print(' '.join({{m.split('.')[0] for m in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_help_imports_nothing_heavy() -> None:
    """Proves that `sweep --help` loads neither torch nor optuna nor sqlalchemy."""
    code = "from click.testing import CliRunner; from sweep.cli import main; CliRunner().invoke(main, ['--help'])"
    assert not loaded(code) & {*HEAVY, "optuna", "sqlalchemy", "rich"}


@pytest.mark.parametrize(
    ("modules", "never"),
    [
        ("sweep.run, sweep.summary, sweep.launch, sweep.views.tables, sweep.views.live", HEAVY),
        (
            "budgets.ledger, budgets.audit, budgets.forecast, budgets.prices, budgets.statement",
            (*HEAVY, "sweep", "trainers"),
        ),
        (
            "trainers.messages, trainers.watchdog, trainers.worker, trainers.replay",
            (*HEAVY, "sweep", "budgets", "optuna"),
        ),
    ],
)
def test_arrows(modules: str, never: tuple[str, ...]) -> None:
    """Proves that sweep never imports torch, that budgets and trainers know nobody above them."""
    assert not loaded(f"import {modules}") & set(never)


def test_trainers_know_no_dollars() -> None:
    """Proves the arrow for the parts that do import torch."""
    modules = "trainers.models, trainers.lora.engine, trainers.full.engine, trainers.check"
    assert not loaded(f"import {modules}") & {"sweep", "budgets", "optuna"}
