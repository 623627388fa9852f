"""The reserve, the provider's bill and the books as others read them, through the real command line."""

from __future__ import annotations

import csv
import io
import json
import shutil
from pathlib import Path

import pytest
from beancount import loader
from beancount.core.data import Balance, Transaction
from sqlalchemy import select
from studies import read, spent, sweep, write_spec

from budgets.schema import hold
from sweep.store import Store

CAP = 50_000


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The database of a study that ended, with a cap of five cents."""
    folder = tmp_path_factory.mktemp("ended")
    spec = write_spec(folder, cap="$0.05", timings=True, trials=6)
    sweep("launch", str(spec), "--yes", cwd=folder)
    return folder / "studies.db"


@pytest.fixture
def ended(recorded: Path, tmp_path: Path) -> Path:
    """A folder with a copy of that database."""
    shutil.copy(recorded, tmp_path)
    return tmp_path


def held_first(folder: Path) -> int:
    """The amount of a study's first hold, in micro-dollars."""
    store = Store(f"sqlite:///{folder}/studies.db")
    with store.read() as connection:
        amount = connection.execute(select(hold.c.amount_micros).order_by(hold.c.id).limit(1)).scalar_one()
    store.dispose()
    return int(amount)


def test_the_reserve_is_the_endgames(tmp_path: Path) -> None:
    """Proves that the search leaves the reserve alone and that the leader is brought to its end from it."""
    spec = write_spec(tmp_path, cap="$0.05", reserve="$0.02", timings=True, trials=8)
    sweep("launch", str(spec), "--yes", cwd=tmp_path)
    found = read(tmp_path)
    kinds = [(row.kind, row.debit, row.credit, row.amount_micros) for row in found["transfers"]]
    aside = kinds.index(("move", "budget", "reserve", 20_000))
    released = kinds.index(("move", "reserve", "budget", 20_000))
    assert aside < released and held_first(tmp_path) <= 30_000, "the search's slices leave the reserve alone"
    asked = [text for text in found["log"] if "lora r" in text]
    over = next(n for n, text in enumerate(found["log"]) if "the search is over" in text)
    assert all(found["log"].index(text) < over for text in asked), "nobody new is asked in the endgame"
    assert found["study"].phase == "endgame" and found["accounts"]["reserve"] == 0
    assert any(trial.state == "completed" for trial in found["trials"])
    assert spent(found["accounts"]) <= CAP
    refused = sweep("launch", str(spec), "--yes", "--set", "budget.reserve=$0.05", cwd=tmp_path, check=2)
    assert "leaves nothing" in refused.stderr


def test_a_lower_bill_is_refunded(ended: Path) -> None:
    """Proves F25, first half: every centre gets its share back, nothing old changes, a repetition does nothing."""
    before = read(ended)
    used = spent(before["accounts"])
    bill = f"${(used - 1_000) / 1e6:.6f}"
    said = sweep("reconcile", "words", "--bill", bill, "--note", "invoice 7", cwd=ended)
    assert "$0.001000 lower: refunded" in said.stderr
    after = read(ended)
    assert spent(after["accounts"]) == used - 1_000
    old = len(before["transfers"])
    assert before["transfers"] == after["transfers"][:old]
    assert all("invoice 7" in row.note for row in after["transfers"][old:])
    assert "is what was charged" in sweep("reconcile", "words", "--bill", bill, cwd=ended).stderr
    assert "less than that: $0.001000" in sweep("statement", cwd=ended).stdout


def test_a_higher_bill_is_charged_and_beyond_the_cap_overrun(ended: Path) -> None:
    """Proves F25, second half: what fits the cap is overhead, the rest overrun, which freezes until it is disproved."""
    used = spent(read(ended)["accounts"])
    sweep("reconcile", "words", "--bill", f"${(used + 500) / 1e6:.6f}", cwd=ended)
    assert read(ended)["accounts"]["overhead:bill"] == 500
    refused = sweep("reconcile", "words", "--bill", "$0.06", cwd=ended, check=5)
    assert "$0.0100" in refused.stderr and "frozen" in refused.stderr
    found = read(ended)
    assert (spent(found["accounts"]), found["accounts"]["overrun"]) == (CAP, 10_000)
    assert "FROZEN" in sweep("status", cwd=ended).stdout
    assert "frozen" in sweep("resume", "words", cwd=ended, check=5).stderr
    sweep("reconcile", "words", "--bill", "$0.05", "--note", "the provider was wrong", cwd=ended)
    assert read(ended)["accounts"]["overrun"] == 0
    sweep("resume", "words", cwd=ended, check=None)
    assert "--bill" in sweep("reconcile", "words", "--bill", "much", cwd=ended, check=2).stderr


def test_beancount_adds_up_to_the_same_balances(ended: Path) -> None:
    """Proves F26 under beancount itself: its own checks pass, and each of its balances is the database's."""
    sweep("reconcile", "words", "--bill", "$0.04", cwd=ended)
    text = sweep("statement", "--format", "beancount", cwd=ended).stdout
    entries, errors, _ = loader.load_string(text)
    assert errors == []
    found = read(ended)
    theirs: dict[str, int] = {}
    for entry in entries:
        if isinstance(entry, Transaction):
            for posting in entry.postings:
                theirs[posting.account] = theirs.get(posting.account, 0) + int(posting.units.number * 1_000_000)
    asserted = {e.account: int(e.amount.number * 1_000_000) for e in entries if isinstance(e, Balance)}
    assert len(asserted) == len(found["accounts"])
    assert {a: m for a, m in asserted.items() if m} == {a: m for a, m in theirs.items() if m}
    assert theirs["Equity:Funding"] == found["accounts"]["world"] == -CAP
    assert theirs["Assets:Budget"] == found["accounts"]["budget"]
    assert sum(m for a, m in theirs.items() if a.startswith("Expenses:")) == spent(found["accounts"]) == 40_000
    wrong = text.replace("balance Expenses:Idle  0", "balance Expenses:Idle  1")
    assert loader.load_string(wrong)[1], "an assertion that is off by a dollar is found"


def test_csv_and_json_say_the_same(ended: Path) -> None:
    """Proves that the formats agree: the accounts' lines add up to `spent` in each."""
    rows = list(csv.DictReader(io.StringIO(sweep("statement", "--format", "csv", cwd=ended).stdout)))
    by_account = {row["account"]: int(row["micros"]) for row in rows}
    lines = sum(m for a, m in by_account.items() if a.startswith(("trial:", "overhead:")) or a == "idle")
    drawn = json.loads(sweep("statement", "--format", "json", cwd=ended).stdout)
    assert lines == by_account["spent"] == drawn["spent"]["micros"]
    assert by_account["spent"] + by_account["held"] + by_account["left"] == by_account["cap"] == CAP
