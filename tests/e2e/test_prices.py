"""What a machine costs, through the real command line: quanta, spot, price changes, prices by the token and the kWh."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from sqlalchemy import select
from studies import TIMINGS, kill, machine_micros, pids, read, spent, start, sweep, wait_for, write_spec

from budgets.schema import hold
from sweep.store import Store


def holds(folder: Path) -> list[int]:
    """Amounts of all holds, in order, in micro-dollars."""
    store = Store(f"sqlite:///{folder}/studies.db")
    with store.read() as connection:
        found = list(connection.execute(select(hold.c.amount_micros).order_by(hold.c.id)).scalars())
    store.dispose()
    return found


def test_a_provider_that_bills_minutes_is_paid_whole_minutes(tmp_path: Path) -> None:
    """Proves that holds and charges are rounded up to the quantum, the rounding is idle time, the cap spans it."""
    billing = {"minimum_seconds": 120, "quantum_seconds": 60}
    spec = write_spec(tmp_path, cap="$0.25", timings=True, machine=billing, trials=4)
    sweep("launch", str(spec), "--yes", cwd=tmp_path)
    found = read(tmp_path)
    (worker,) = found["workers"]
    assert worker.settled_ms % 60_000 == 0 and worker.settled_ms >= 120_000
    assert spent(found["accounts"]) == worker.settled_ms  # at $3.60 an hour a millisecond is a micro-dollar
    assert found["accounts"]["idle"] >= worker.settled_ms - worker.at_ms > 0
    refused = sweep("launch", str(spec), "--yes", "--study", "poor", "--cap", "$0.11", cwd=tmp_path, check=3)
    assert "left" in refused.stderr, "the least that is billed, two minutes, does not fit the cap"


@pytest.mark.parametrize(("victim", "minimum"), [("worker", 8), ("all", 60)])
def test_a_worker_that_follows_another_uses_up_its_quantum(tmp_path: Path, victim: str, minimum: int) -> None:
    """Proves that one rental is not billed twice: after a kill the next worker starts inside the paid quantum.

    Also when another orchestrator starts it, which knows from the tables alone up to when the dead one was charged.
    """
    billing = {"minimum_seconds": minimum, "quantum_seconds": 4}
    spec = write_spec(tmp_path, cap="$0.5", sleep=0.0005, machine=billing, trials=4)
    process = start("launch", str(spec), "--yes", cwd=tmp_path)
    out = tmp_path / "out.txt"
    wait_for(lambda: out.exists() and "promoted" in out.read_text())
    running = pids(tmp_path)
    if victim == "all":
        process.kill()
        process.wait()
        assert kill(running["watchdog"])
        kill(running["worker"])
        sweep("resume", "words", cwd=tmp_path)
    else:
        assert kill(running["worker"])
        assert process.wait(timeout=90) == 0
    found = read(tmp_path)
    first, second = found["workers"]
    assert first.settled_ms % 4_000 == 0
    paid_until = first.origin_boot_ms + first.settled_ms
    assert second.origin_boot_ms + second.tariff.paid_ms == paid_until and second.tariff.minimum_ms == 0
    assert second.tariff.paid_ms > 0
    assert second.settled_ms % 4_000 == second.tariff.paid_ms % 4_000
    assert spent(found["accounts"]) == machine_micros(found["workers"])


def test_a_spot_machine_is_held_at_the_on_demand_price(tmp_path: Path) -> None:
    """Proves that holds cover the ceiling while charges follow the price, and that the ceiling binds the last slice."""
    spot = {"price": "$1.80/hour", "market": "spot", "on_demand": "$3.60/hour"}
    spec = write_spec(tmp_path, cap="$0.05", timings=True, machine=spot, trials=6)
    sweep("launch", str(spec), "--yes", cwd=tmp_path)
    found = read(tmp_path)
    (worker,) = found["workers"]
    assert spent(found["accounts"]) == -(-worker.settled_ms // 2) <= 50_000
    assert holds(tmp_path)[0] == min(worker.paid_ms, holds(tmp_path)[0])
    assert max(holds(tmp_path)) <= 50_000 and max(holds(tmp_path)) > spent(found["accounts"]) // 2


@pytest.mark.parametrize(("price", "shortened"), [("$7.20/hour", False), ("$360/hour", True)])
def test_a_price_that_changes_in_mid_slice_counts_from_then_on(tmp_path: Path, price: str, shortened: bool) -> None:
    """Proves F21: the metering splits at the change; where the cap can't pay the slice any more, it is shortened."""
    spec = write_spec(tmp_path, cap="$0.6", sleep=0.0008, trials=5)
    process = start("launch", str(spec), "--yes", cwd=tmp_path)
    out = tmp_path / "out.txt"
    wait_for(lambda: out.exists() and "starts" in out.read_text())
    assert "from now on" in sweep("reprice", "words", price, "--note", "a mail", cwd=tmp_path).stderr
    code = process.wait(timeout=90)
    found = read(tmp_path)
    worker = found["workers"][0]
    assert [p for p, _ in worker.tariff.pieces(worker.settled_ms)] == [3_600_000, round(1e6 * float(price[1:-5]))]
    total = sum(w.tariff.cost(w.settled_ms) for w in found["workers"])
    assert spent(found["accounts"]) + found["accounts"]["overrun"] == total
    assert spent(found["accounts"]) <= 600_000 and found["accounts"]["overrun"] == 0
    if shortened:
        assert worker.final and worker.paid_ms < 20_000 and code in {0, 3}
    else:
        assert code == 0
        machine = json.loads(sweep("statement", "--format", "json", cwd=tmp_path).stdout)["machine"]
        assert len(machine["spans"]) == 2 and machine["cost"]["micros"] == total
    assert "the unit" not in sweep("status", cwd=tmp_path).stdout
    assert "priced by the hour" in sweep("reprice", "words", "$1/Mtok", cwd=tmp_path, check=2).stderr


def test_a_service_that_bills_tokens_is_paid_for_tokens(tmp_path: Path) -> None:
    """Proves a price a million tokens: load and waiting are free, trained and evaluated tokens are charged, no more."""
    spec = write_spec(tmp_path, cap="$0.05", sleep=0.00001, machine={"price": "$0.50/Mtok"}, trials=6)
    sweep("launch", str(spec), "--yes", cwd=tmp_path)
    found = read(tmp_path)
    tokens = sum(a.tokens - a.from_tokens for a in found["attempts"])
    (worker,) = found["workers"]
    metered = worker.settled_ms / 3.6
    assert 0 < tokens < metered <= 100_000
    assert abs(spent(found["accounts"]) - metered * 0.5) <= 1
    assert found["accounts"]["idle"] == 0 and max(t.full_loss or 0 for t in found["trials"]) > 0
    assert "tokens x $0.50/Mtok" in sweep("statement", cwd=tmp_path).stdout
    assert "$0.50/Mtok" in sweep("status", cwd=tmp_path).stdout


def test_your_own_machine_costs_its_electricity(tmp_path: Path) -> None:
    """Proves a price a kWh: 400 W at 30 cents are 12 cents an hour."""
    own = {"price": "$0.30/kWh", "watts": 400}
    spec = write_spec(tmp_path, cap="$0.01", timings=True, machine=own, trials=2)
    sweep("launch", str(spec), "--yes", cwd=tmp_path)
    assert read(tmp_path)["study"].tariff.now == 120_000
    refused = sweep("launch", str(spec), "--yes", "--set", "machine.watts=null", cwd=tmp_path, check=2)
    assert "watts" in refused.stderr


def test_machines_of_different_prices_in_one_study(tmp_path: Path) -> None:
    """Proves that a study may go on elsewhere at another price: each worker keeps its own, the statement names both."""
    spec = write_spec(tmp_path, cap="$0.02", timings=True)
    sweep("launch", str(spec), "--yes", cwd=tmp_path, check=None)
    sweep("reprice", "words", "$1.20/hour", "--note", "another machine", cwd=tmp_path)
    sweep("resume", "words", "--cap", "$0.03", cwd=tmp_path)
    found = read(tmp_path)
    assert {w.micros_per_hour for w in found["workers"]} == {3_600_000, 1_200_000}
    assert spent(found["accounts"]) == sum(w.tariff.cost(w.settled_ms) for w in found["workers"])
    text = sweep("statement", cwd=tmp_path).stdout
    assert "x $1.20/hour +" in " ".join(text.split())


def test_a_part_of_a_quantum_is_promised_to_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Proves that a cap between two quanta brings a trial to its end as the lower one does; of a cap under one quantum
    it is said which whole quanta would."""
    monkeypatch.setitem(TIMINGS, "train", {"lora": 0.006, "full": 0.006})
    machine = {"quantum_seconds": 60, "minimum_seconds": 60}
    spec = write_spec(tmp_path, cap="$0.10", timings=True, machine=machine)
    sweep("launch", str(spec), "--yes", "--anyway", cwd=tmp_path)
    found = read(tmp_path)
    assert any(trial.state == "completed" for trial in found["trials"]) and spent(found["accounts"]) == 60_000
    monkeypatch.setitem(TIMINGS, "train", {"lora": 0.05, "full": 0.05})
    folder = tmp_path / "dear"
    folder.mkdir()
    spec = write_spec(folder, cap="$0.10", timings=True, machine=machine)
    done = sweep("launch", str(spec), "--yes", "--anyway", cwd=folder, check=3)
    (cap,) = re.findall(r"--cap '\$([0-9.]+)'", done.stderr.splitlines()[-1])
    whole = round(1_000_000 * float(cap)) - spent(read(folder)["accounts"])
    assert whole >= 60_000 and whole % 60_000 == 0
