"""`sweep compare`, from a database written by hand to its JSON, its tables and its exit codes."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console
from sqlalchemy import select, update
from test_memory import SMOLLM2
from verdict_samples import MICROS, SEEDS, USUAL, Told, examples, trained, write

from sweep import comparison, tables, verdict
from sweep.errors import InvariantError, NotFoundError
from sweep.store import Store
from sweep.views import compare
from trainers.memory import Setup, peak

LOSSES = {"LoRA": (0.96, 0.962, 0.958), "full": (0.91, 0.912, 0.909)}


def confirmed(losses: Sequence[float], seeds: Sequence[int] = SEEDS) -> dict[int, tuple[float, float]]:
    """Validation and test losses by seed."""
    return {seed: (loss + 0.01, loss) for seed, loss in zip(seeds, losses, strict=False)}


PAIR = (Told(0, confirmed=confirmed(LOSSES["LoRA"])), Told(4, "full", None, confirmed=confirmed(LOSSES["full"])))


def compared(folder: Path, told: Sequence[Told] = USUAL, **how: Any) -> dict[str, Any]:
    """Writes a study and compares; everything in it must be JSON."""
    values = read(write(folder, told, **how))
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    return values


def read(url: str) -> dict[str, Any]:
    store = Store(url)
    with store.read() as connection:
        values = comparison.compare(connection, "words")
    store.dispose()
    return values


def shown(values: dict[str, Any], width: int = 80, *, encoding: str = "utf-8", with_claims: bool = False) -> str:
    """What a terminal of that width would get."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    compare.show_compare(Console(width=width, file=file), values, with_claims=with_claims)
    file.flush()
    return raw.getvalue().decode(encoding)


def test_the_usual_verdict(tmp_path: Path) -> None:
    """Proves the whole way: the better LoRA by validation, its share with an interval, its cost, and the ranks."""
    values = compared(tmp_path)
    assert values["sentence"].startswith("LoRA r=16 reached 91 % (")
    assert values["sentence"].endswith("ranks 16 and 64 can't be told apart at this budget, rank 4 is worse")
    assert " of full training's gain for 8 % of its cost (28 % of it if both train alone); " in values["sentence"]
    tests = [0.962, 0.959, 0.96], [0.91, 0.909, 0.908]
    lora, full = (statistics.fmean(losses) for losses in tests)
    assert values["untrained"] == pytest.approx(1.5)
    assert values["lora"]["test"]["value"] == pytest.approx(lora)
    assert values["full"]["gain"]["value"] == pytest.approx(1.5 - full)
    assert values["share"]["value"] == pytest.approx((1.5 - lora) / (1.5 - full))
    assert values["difference"]["value"] == pytest.approx(lora - full)
    spread = [statistics.variance(losses) / 3 for losses in tests]
    assert values["difference"]["seeds_error"] == pytest.approx(math.sqrt(sum(spread)))
    assert values["missing"] == [] and values["notes"] == []


def test_the_share_is_that_of_the_stored_examples(tmp_path: Path) -> None:
    """Proves that nothing is lost on the way from the tables to the statistics."""
    values = compared(tmp_path, PAIR)
    numbers = {one["method"]: [run["number"] for run in one["runs"]] for one in values["confirmed"]}
    runs = {
        method: np.array([trained(loss, key) for loss, key in zip(LOSSES[name], numbers[method], strict=True)])
        for method, name in (("lora", "LoRA"), ("full", "full"))
    }
    tokens, base = examples()
    expected = verdict.share(runs["lora"], runs["full"], base, tokens).estimate
    assert values["share"]["value"] == pytest.approx(expected.value)
    assert (values["share"]["low"], values["share"]["high"]) == pytest.approx((expected.low, expected.high))


def test_validation_rows_choose_and_test_rows_do_not(tmp_path: Path) -> None:
    """Proves that the configuration with the better test loss loses to the one with the better validation loss."""
    first = Told(0, confirmed=dict.fromkeys(SEEDS, (0.95, 0.99)))
    second = Told(1, rank=64, loss=0.5, confirmed=dict.fromkeys(SEEDS, (0.97, 0.9)))
    values = compared(tmp_path, [first, second, PAIR[1]])
    assert values["lora"]["trial"] == 0
    assert [one["chosen"] for one in values["confirmed"]] == [True, False, True]


def test_who_left_the_race_early_does_not_win_by_a_lucky_seed(tmp_path: Path) -> None:
    """Proves that two seeds of a better mean lose to three, and that common seeds alone are compared."""
    lucky = Told(1, rank=64, confirmed=confirmed([0.80, 0.81]))
    further = Told(2, rank=8, confirmed=confirmed([0.97, 0.97, 0.97, 0.2], [*SEEDS, 104]))
    values = compared(tmp_path, [PAIR[0], lucky, further, PAIR[1]])
    assert values["lora"]["trial"] == 0
    assert [row["rank"] for row in values["ranks"]["rows"]] == [8, 16] and values["ranks"]["seeds"] == 3
    assert values["ranks"]["rows"][0]["test"] == pytest.approx(0.97)


def test_the_leaders_are_compared_by_all_seeds_that_both_have(tmp_path: Path) -> None:
    """Proves that the verdict names whom the race hands over: by six seeds, not three, where two lead."""
    six = [*SEEDS, 104, 105, 106]
    early = Told(1, rank=64, confirmed=confirmed([0.90, 0.90, 0.90, 0.95, 0.95, 0.95], six))
    later = Told(2, rank=8, confirmed=confirmed([0.91, 0.91, 0.91, 0.89, 0.89, 0.89], six))
    values = compared(tmp_path, [PAIR[0], early, later, PAIR[1]])
    assert values["lora"]["trial"] == 2


def test_a_rank_that_the_search_gave_up_is_not_called_worse(tmp_path: Path) -> None:
    """Proves what is said of a rank none of whose configurations came to its end in the search: nothing."""
    low = Told(1, rank=4, confirmed=confirmed([0.99, 0.992, 0.988]))
    judged = compared(tmp_path / "judged", [PAIR[0], low, PAIR[1]])
    assert judged["sentence"].endswith("rank 16 is better than rank 4")
    parked = dataclasses.replace(low, state="paused")
    given_up = compared(tmp_path / "given-up", [PAIR[0], parked, PAIR[1]])
    said = "rank 16 is the best; of rank 4 nothing is said: no configuration of it came to its end in the search"
    assert given_up["sentence"].endswith(said)
    assert [row["standing"] for row in given_up["ranks"]["rows"]] == ["untuned", "best"]
    assert "not tuned" in shown(given_up) and "0 of 1" in shown(given_up, 120)
    high = Told(1, rank=64, state="paused", confirmed=confirmed([0.99, 0.992, 0.988]))
    claim = compared(tmp_path / "claim", [PAIR[0], high, PAIR[1]])["claims"][4]
    assert claim["holds"] == "open" and "none of the 1 of r=64 came to its end" in claim["measured"]


def test_costs_are_given_alone_and_as_charged(tmp_path: Path) -> None:
    """Proves both ratios, the elapsed time of a pack, and measured memory."""
    costs = compared(tmp_path)["costs"]
    assert costs["lora"]["charged"] == {"micros": MICROS["lora"], "runs": 3}
    assert costs["ratio"]["charged"] == pytest.approx(MICROS["lora"] / MICROS["full"])
    assert costs["ratio"]["alone"] > 3 * costs["ratio"]["charged"]  # a pack of four shares what a step costs
    for method, seconds in (("lora", 2.0), ("full", 20.0)):
        alone = costs[method]["alone"]
        assert alone["low"] < alone["micros"] < alone["high"]
        assert alone["micros"] == pytest.approx(alone["seconds"] * 1000, abs=1)  # $3.60 an hour
        assert alone["seconds"] > 0.9 * seconds
    assert costs["lora"]["elapsed"] == pytest.approx(8.06) and costs["lora"]["width"] == 4.0
    assert costs["ratio"]["peak"] == 0.25


def test_alone_is_alone_while_a_pack_trains(tmp_path: Path) -> None:
    """Proves that the forecast of a run alone does not depend on who shares the machine when one asks."""
    packed = {"machine": {"price": "$3.60/hour", "device": "cpu", "slots": 4}}
    url = write(tmp_path, changes=packed)
    quiet = read(url)["costs"]["lora"]["alone"]
    store = Store(url)
    with store.write() as connection:
        some = tables.trial.c.number.in_([1, 2, 3])
        connection.execute(update(tables.trial).where(some).values(state="waiting"))
    store.dispose()
    assert read(url)["costs"]["lora"]["alone"] == quiet


def test_predicted_memory_stands_beside_what_was_measured(tmp_path: Path) -> None:
    """Proves that formulas are asked for the same configuration at the pack's width, and for nothing unmeasured."""
    url = write(tmp_path)
    store = Store(url)
    with store.write() as connection:
        facts = json.loads(connection.execute(select(tables.study.c.facts)).scalar_one())
        facts["data"]["splits"]["train"]["longest"] = 128
        facts |= {"shape": dataclasses.asdict(SMOLLM2), "stream_tokens": 65_536}
        connection.execute(update(tables.study).values(facts=json.dumps(facts)))
    store.dispose()
    values = read(url)
    lora = Setup(method="lora", tokens=65_536, targets="all-linear", rank=16, slots=4)
    costs = values["costs"]
    assert costs["lora"]["peak_predicted"] == peak(SMOLLM2, lora).total
    assert 2e9 < costs["full"]["peak_predicted"] < 8e9, "14 bytes a parameter and activations"
    ratio = costs["lora"]["peak_predicted"] / costs["full"]["peak_predicted"]
    assert costs["ratio"]["peak_predicted"] == pytest.approx(ratio)
    assert re.search(r"predicted +\d+\.\d\d GiB +\d+\.\d\d GiB .*formulas", shown(values))
    assert "predicted" not in shown(compared(tmp_path / "unmeasured", peaks=False))


def test_unmeasured_memory_is_left_out(tmp_path: Path) -> None:
    values = compared(tmp_path, peaks=False)
    assert values["costs"]["ratio"]["peak"] is None and values["costs"]["lora"]["peak"] is None
    assert "peak memory" not in shown(values)


def test_equal_numbers_are_compared(tmp_path: Path) -> None:
    """Proves the rule: stopped ones count as the worst completed one, diverged ones as the untrained model."""
    url = write(tmp_path)
    store = Store(url)
    with store.write() as connection:
        connection.execute(update(tables.trial).where(tables.trial.c.number == 5).values(state="pruned", diverged=1))
    store.dispose()
    values = read(url)
    tried = values["tried"]
    assert tried["lora"]["configurations"] == 4 and tried["lora"]["completed"] == 3
    assert tried["full"]["configurations"] == 2 and tried["full"]["diverged"] == 1
    one, two = tried["equal"]
    assert one["lora"] == pytest.approx(statistics.fmean([0.975, 0.98, 1.3, 1.3]))
    assert one["full"] == pytest.approx(statistics.fmean([0.93, 1.5]))
    assert two["lora"] == pytest.approx(statistics.fmean([0.975] * 3 + [0.98] * 2 + [1.3]))
    assert two["share"] == pytest.approx((1.5 - two["lora"]) / (1.5 - 0.93))
    exchange, costs = values["exchange"], values["costs"]
    assert exchange["lora_micros"] == 13 * MICROS["lora"] and exchange["full_micros"] == 5 * MICROS["full"]
    assert exchange["lora_buys_full"] == pytest.approx(13 * MICROS["lora"] / costs["full"]["alone"]["micros"])
    assert exchange["full_buys_lora"] == pytest.approx(5 * MICROS["full"] / MICROS["lora"])


def test_forgetting_and_overfitting(tmp_path: Path) -> None:
    """Proves retention before and after, and the gap of every run that came to its end, by method and rank."""
    values = compared(tmp_path)
    retention = values["retention"]
    assert retention["before"] == pytest.approx(2.0) and retention["rows"] == 40
    change = {row["method"]: row["change"]["value"] for row in retention["methods"]}
    assert change["lora"] == pytest.approx(0.02, abs=0.008) and change["full"] == pytest.approx(0.1, abs=0.008)
    gaps = {(row["method"], row["rank"]): (row["runs"], row["gap"]) for row in values["overfitting"]}
    assert gaps["lora", 16] == (4, pytest.approx(0.0275)) and gaps["full", None] == (5, pytest.approx(0.026))
    assert compared(tmp_path / "without", retention=False)["retention"] is None


def test_a_metric_replaces_the_loss(tmp_path: Path) -> None:
    """Proves that the user's metric is compared, higher is better, with the majority baseline beside it."""
    lora = Told(0, metric=0.6, confirmed=confirmed([0.6, 0.62, 0.58]))
    other = Told(1, rank=64, metric=0.5, confirmed=confirmed([0.5, 0.5, 0.5]))
    full = Told(4, "full", None, metric=0.9, confirmed=confirmed([0.9, 0.92, 0.88]))
    values = compared(tmp_path, [lora, other, full], changes={"objective": "exact_match"})
    assert values["measure"]["name"] == "exact_match" and values["majority"] == 0.3
    assert values["lora"]["trial"] == 0 and values["lora"]["test"]["value"] == pytest.approx(0.6, abs=0.01)
    assert values["share"]["value"] == pytest.approx(0.5 / 0.8, abs=0.02)
    assert values["lora"]["gain"]["value"] > 0 > values["difference"]["value"]
    assert values["ranks"]["rows"][0]["standing"] == "best"
    assert values["tried"]["lora"]["best"] == {"trial": 0, "value": 0.6}
    assert "of full training's gain in exact_match" in values["sentence"]
    assert "majority" in shown(values)


def test_runs_that_diverged_are_told(tmp_path: Path) -> None:
    lora, full = PAIR
    shaky = Told(1, rank=64, confirmed=confirmed([0.5, 0.5, 0.5]), failed=1)
    values = compared(tmp_path, [lora, shaky, Told(4, "full", None, confirmed=full.confirmed, failed=1)])
    assert values["lora"]["trial"] == 0  # a better one that fails under one seed in four is not what to choose
    assert values["full"]["failed"] == 1 and values["full"]["seeds"] == 3
    assert values["notes"][1].startswith("1 of 4 confirmations of full lr 3.0e-5 b8 diverged or failed")
    assert "the verdict speaks of runs that came to their end" in values["notes"]


@pytest.mark.parametrize(
    ("told", "changes", "base", "missing"),
    [
        (PAIR[:1], None, True, "no full training configuration is confirmed: `sweep resume words`"),
        (PAIR[:1], {"search": {"method": "lora"}}, True, "full training was not searched"),
        ((Told(0, confirmed=confirmed([0.96])), PAIR[1]), None, True, "confirmed under 1 of 3 seeds, so no interval"),
        (PAIR, None, False, "the untrained model was not scored on the test rows"),
    ],
)
def test_what_is_missing_is_said(
    tmp_path: Path, told: Sequence[Told], changes: dict[str, Any] | None, base: bool, missing: str
) -> None:
    values = compared(tmp_path, told, changes=changes, base=base)
    assert len(values["missing"]) == 1 and missing in values["missing"][0]
    assert comparison.nothing_confirmed(values) is None
    assert values["share"] is None or not values["share"]["claimed"]


@pytest.mark.parametrize(
    ("changes", "state", "hint"),
    [
        (None, {}, "`sweep resume words` goes on to the confirmations"),
        (None, {"phase": "endgame"}, "`sweep resume words --cap USD`"),
        (None, {"state": "closed"}, "the study is closed: launch it again"),
        ({"endgame": {"seeds": 0}}, {}, "the spec says endgame.seeds: 0"),
    ],
)
def test_nothing_confirmed_says_how_to_get_it(
    tmp_path: Path, changes: dict[str, Any] | None, state: dict[str, str], hint: str
) -> None:
    url = write(tmp_path, [Told(0), Told(4, "full", None)], changes=changes)
    if state:
        store = Store(url)
        with store.write() as connection:
            connection.execute(update(tables.study).values(**state))
        store.dispose()
    values = read(url)
    error = comparison.nothing_confirmed(values)
    assert isinstance(error, NotFoundError) and hint in error.hint
    assert values["tried"]["lora"]["best"] == {"trial": 0, "value": 1.0}
    assert "nothing is confirmed" in shown(values)


def test_scores_on_other_rows_are_refused(tmp_path: Path) -> None:
    url = write(tmp_path)
    store = Store(url)
    with store.write() as connection:
        one = (tables.scores.c.trial == tables.CONFIRMATIONS + 1) & (tables.scores.c.split == "test")
        connection.execute(update(tables.scores).where(one).values(nll="[1.0, 2.0]", tokens="[3, 4]"))
    store.dispose()
    with pytest.raises(InvariantError, match="trials -1 and 1000001 were scored on different test rows"):
        read(url)


def test_a_run_without_finite_scores_is_no_confirmation(tmp_path: Path) -> None:
    url = write(tmp_path, PAIR)
    store = Store(url)
    with store.write() as connection:
        one = (tables.scores.c.trial == tables.CONFIRMATIONS + 1) & (tables.scores.c.split == "test")
        connection.execute(update(tables.scores).where(one).values(nll=json.dumps([math.nan] * 60)))
    store.dispose()
    assert read(url)["lora"]["seeds"] == 2


def holds(values: dict[str, Any]) -> list[str]:
    return [row["holds"] for row in values["claims"]]


def test_claims_stand_beside_what_was_measured(tmp_path: Path) -> None:
    values = compared(tmp_path)
    assert holds(values) == ["open", "yes", "yes", "no", "open", "corrected", "yes"]
    text = shown(values, with_claims=True)
    for words in (
        "times alone, 12.5 times as charged",
        "14 GB in half precision, 28 GB in single",
        "r=16 0.9603, r=64 0.9670: not told apart",
    ):
        assert words in text
    alone = compared(tmp_path / "alone", PAIR[:1])
    assert holds(alone)[:5] == ["open"] * 5


def test_claims_can_fail(tmp_path: Path) -> None:
    """Proves that a measured share outside of the claimed range, and ranks that differ, are told as such."""
    poor = Told(0, confirmed=confirmed([1.3, 1.302, 1.298]))
    worse = Told(1, rank=64, confirmed=confirmed([1.4, 1.402, 1.398]))
    assert holds(compared(tmp_path, [poor, worse, PAIR[1]]))[:5] == ["no", "no", "yes", "no", "yes"]


def test_claims_can_be_surpassed_and_ranks_compared_behind_a_third(tmp_path: Path) -> None:
    """Proves that a share above the claimed range is told as more, and two ranks apart where neither is the best."""
    best = Told(0, rank=32, confirmed=confirmed([0.8, 0.801, 0.799]))
    sixteen = Told(1, rank=16, confirmed=confirmed([1.1, 1.102, 1.098]))
    found = compared(tmp_path, [best, sixteen, Told(2, rank=64, confirmed=confirmed([1.4, 1.402, 1.398])), PAIR[1]])
    assert holds(found)[:5] == ["more", "more", "yes", "no", "yes"]
    assert "r=16 1.1000, r=64 1.4000: 16 is better here" in shown(found, with_claims=True)


STATES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "usual": compared,
    "few": lambda folder: compared(folder, [Told(0, confirmed=confirmed([0.96, 0.97])), PAIR[1]]),
    "one": lambda folder: compared(folder, PAIR[:1]),
    "nothing": lambda folder: compared(folder, [Told(0), Told(4, "full", None)], base=False),
    "empty": lambda folder: compared(folder, [], base=False),
}


@pytest.mark.parametrize("state", STATES)
def test_no_line_is_wider_than_the_terminal(tmp_path: Path, state: str) -> None:
    values = STATES[state](tmp_path)
    for width in (80, 160):
        lines = shown(values, width, with_claims=True).splitlines()
        assert lines and max(map(cell_len, lines)) <= width
    assert shown(values, encoding="ascii", with_claims=True).isascii()


def test_the_table_shows_what_the_values_say(tmp_path: Path) -> None:
    text = shown(compared(tmp_path))
    for words in (
        "LoRA less full   0.051 (",
        "as charged    $0.0020   $0.0250      8.0 %  measured",
        "can't be told apart",
        "peak memory  2.00 GiB  8.00 GiB     25.0 %",
        "forgetting: loss on 40 retention examples",
        "next: sweep compare words --claims",
    ):
        assert words in text


def sweep(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command itself, in a process of its own."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SWEEP_", "FORCE_COLOR"))}
    command = [sys.executable, "-W", "error", "-m", "sweep", "compare", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_command(tmp_path: Path) -> None:
    """Proves tables and JSON of the real command line."""
    write(tmp_path)
    told = sweep(tmp_path, "words")
    assert told.returncode == 0 and told.stderr == ""
    assert told.stdout.startswith("study words: LoRA r=16 reached 91 % (")
    values = json.loads(sweep(tmp_path, "--json").stdout)
    assert values["schema_version"] == 1 and values["share"]["claimed"] and len(values["claims"]) == 7


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_the_command_without_confirmations(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """Proves that what the search knows is on stdout, one line of what is missing on stderr, and 4 the exit code."""
    write(tmp_path, [Told(0), Told(4, "full", None)])
    done = sweep(tmp_path, "words", *arguments)
    assert done.returncode == 4 and done.stderr.count("\n") == 1
    assert "no confirmed configuration yet" in done.stderr and "sweep resume words" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout
    if arguments:
        assert json.loads(done.stdout)["tried"]["full"]["configurations"] == 1
        assert json.loads(done.stderr)["error"]["code"] == "not_found"


def test_the_command_of_no_such_study(tmp_path: Path) -> None:
    write(tmp_path)
    done = sweep(tmp_path, "sentences")
    assert done.returncode == 4 and done.stdout == ""
    assert done.stderr == "sweep: there is no study sentences (`sweep list` shows the studies of this database)\n"
