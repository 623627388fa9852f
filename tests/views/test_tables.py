"""What the read verbs print: nothing is wider than the terminal, what is copied is whole, amounts add up."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from decimal import Decimal

import pytest
import yaml
from rich.cells import cell_len
from rich.console import Console
from view_samples import (
    a_best,
    a_confirmation,
    a_confirmed_best,
    a_plan,
    a_statement,
    a_status,
    a_trial,
    money,
    some_trials,
)

from sweep.views import tables
from sweep.views.plan import show_plan

Show = Callable[[Console], None]


def rendered(show: Show, width: int = 80, *, encoding: str = "utf-8", terminal: bool = False) -> str:
    """What a terminal of that width and encoding would get, without its colours."""
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding, newline="\n")
    console = Console(width=width, file=file, force_terminal=terminal, color_system="standard" if terminal else None)
    show(console)
    file.flush()
    return re.sub(r"\x1b\[[0-9;]*m", "", raw.getvalue().decode(encoding))


def copied(line: str) -> bool:
    """Lines that may be wider than the terminal because people copy them."""
    return "/srv/studies/" in line


REPEATED = [*a_confirmation(4)["runs"], a_confirmed_best(4)["deliverable"]["trial"]]


def planned(console: Console, cap: int, stop_command: str | None = None, **endgame: int) -> None:
    """A plan as `launch` shows it."""
    values, facts = a_plan(cap, **endgame)
    show_plan(console, values, "from the spec", facts, stop_command)


VIEWS: dict[str, Show] = {
    "trials": lambda c: tables.show_trials(c, "words", some_trials(60), None),
    "few trials": lambda c: tables.show_trials(c, "words", some_trials(12), 5),
    "no trials": lambda c: tables.show_trials(c, "words", [], None),
    "best": lambda c: tables.show_best(c, a_best(a_trial(4)), "sweep show words 4"),
    "best confirmed": lambda c: tables.show_best(c, a_confirmed_best(4), "sweep show words 4"),
    "finale": lambda c: tables.show_trial(c, a_confirmed_best(4)["deliverable"]["trial"]),
    "confirmation": lambda c: tables.show_trial(c, a_confirmation(4)["runs"][1] | {"metric": 0.5, "metric_error": 0.1}),
    "confirmations": lambda c: tables.show_trials(c, "words", [*some_trials(4), *REPEATED], None),
    "best paused": lambda c: tables.show_best(c, a_best(a_trial(3, "paused"), None), "sweep show words 3"),
    "trial": lambda c: tables.show_trial(c, a_trial(4)),
    "diverged": lambda c: tables.show_trial(c, a_trial(5, "pruned", diverged=True)),
    "statement": lambda c: tables.show_statement(c, a_statement([2_500] * 40, cap=200_000)),
    "huge": lambda c: tables.show_statement(c, a_statement([10**14] * 9, cap=10**15, overrun=10**12)),
    "status": lambda c: tables.show_status(c, a_status([a_trial(2), a_trial(3, "live"), a_trial(8, "waiting")])),
    "huge status": lambda c: tables.show_status(
        c, a_status([a_trial(2, "live", cost=10**14)], cap=10**15, frozen=True)
    ),
    "status of a search that has enough": lambda c: tables.show_status(
        c, a_status([a_trial(2)], stopped="trial 2 was not improved on by more than 0.2 % over 20 trials")
    ),
    "empty status": lambda c: tables.show_status(c, a_status([], cap=3)),
    "plan": lambda c: planned(c, 200_000_000, seeds=3),
    "plan of nothing": lambda c: planned(c, 60),
    "list": lambda c: tables.show_list(
        c,
        [
            {
                "study": "words-" * 8,
                "state": "open",
                "standing": "out of money",
                "model": "org/" + "m" * 70,
                "trials": n,
                "best": best,
            }
            | {"spent": money(n), "cap": money(10**15)}
            for n, best in [(3, None), (100_000, 3.01)]
        ],
    ),
    "no list": lambda c: tables.show_list(c, []),
}


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("width", [80, 160])
@pytest.mark.parametrize("name", VIEWS)
def test_no_line_is_wider_than_the_terminal(name: str, width: int, terminal: bool) -> None:
    lines = rendered(VIEWS[name], width, terminal=terminal).splitlines()
    assert lines
    assert [line for line in lines if cell_len(line) > width and not copied(line)] == []


def test_a_thousand_trials_fit() -> None:
    lines = rendered(lambda c: tables.show_trials(c, "words", some_trials(1_000), None)).splitlines()
    assert len(lines) == 1 + 1_000 + 2
    assert max(map(cell_len, lines)) <= 80


@pytest.mark.parametrize("name", VIEWS)
def test_an_ascii_terminal_gets_ascii(name: str) -> None:
    assert rendered(VIEWS[name], encoding="ascii").isascii()


def test_trials_are_told_without_colour() -> None:
    text = rendered(VIEWS["few trials"])
    assert "\x1b" not in text
    assert re.search(r"^0 lora r64 a128 all-linear lr 2\.1e-3 b16 completed +5/5 \d\.\d{4}\*", text, re.M)
    assert "7 more: sweep trials words" in text
    assert "* loss over all validation rows" in text


def test_reasons_are_shown_where_there_is_room() -> None:
    trials = some_trials(3)
    for width, seen in [(80, False), (119, False), (120, True), (160, True)]:
        text = rendered(lambda c: tables.show_trials(c, "words", trials), width)
        assert ("diverged: the loss is nan" in text) is seen


def test_a_loss_of_a_rung_is_not_taken_for_one_over_all_rows() -> None:
    text = rendered(lambda c: tables.show_trials(c, "words", [a_trial(0), a_trial(2, "paused")]))
    done, parked = text.splitlines()[1:3]
    assert re.search(r"\d\.\d{4}\* \$", done) and re.search(r"\d\.\d{4}  \$", parked)


def test_text_from_elsewhere_cannot_steer_the_terminal() -> None:
    trial = a_trial(1, "failed") | {"reason": "error: [/bold] \x1b[2J\r\nsecond [red]line"}
    trials = rendered(lambda c: tables.show_trials(c, "words", [trial]), 160)
    assert "error: [/bold] [2J second [red]line" in trials
    assert "\x1b[2J" not in rendered(lambda c: tables.show_trial(c, trial))


@pytest.mark.parametrize("width", [80, 160])
def test_folder_and_python_are_whole(width: int) -> None:
    trial = a_trial(4)
    for show in (VIEWS["best"], VIEWS["trial"]):
        assert f"  {trial['folder']}\n" in rendered(show, width)
    best = rendered(VIEWS["best"], width)
    assert f'\nmodel = AutoPeftModelForCausalLM.from_pretrained("{trial["folder"]}")\n' in best
    assert "from transformers import AutoModelForCausalLM\n" in rendered(
        lambda c: tables.show_best(c, a_best(a_trial(7)), "sweep show 7"), width
    )


def test_best_says_how_it_compares() -> None:
    assert "% below" in rendered(VIEWS["best"])
    assert "not evaluated yet" in rendered(VIEWS["best paused"])
    worse = rendered(lambda c: tables.show_best(c, a_best(a_trial(4), 2.0), "sweep show 4"))
    assert "% ABOVE" in worse


def test_a_run_under_a_new_seed_is_on_its_way_to_its_end() -> None:
    """Proves that its progress is a share of the whole run: it has no rung before its end."""
    run = a_trial(2, "live") | {"label": "1·2", "source": 1, "rung": -1, "curve": [], "tokens": 2_000, "step": 50}
    run["config"] |= {"batch_size": 2}
    text = rendered(lambda c: tables.show_status(c, a_status([run])))
    assert re.search(r"^1·2 .* live 40%", text, re.M) and "3 of 9 runs under new seeds done" in text


def _dollars(text: str) -> dict[str, list[Decimal]]:
    """Amounts with six decimals by the first word of their line."""
    found: dict[str, list[Decimal]] = {}
    for line in text.splitlines():
        match = re.search(r"(?<!\$)\b([\d,]+\.\d{6})\b", line)
        if match:
            found.setdefault("others" if " others " in line else line.split()[0], []).append(
                Decimal(match[1].replace(",", ""))
            )
    return found


@pytest.mark.parametrize("width", [80, 160])
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(
    ("costs", "cap"), [([], 60_000), ([1, 0, 7], 60_000), (list(range(300)), 10**6), ([10**14] * 20, 10**16)]
)
def test_a_statement_adds_up(costs: list[int], cap: int, everything: bool, width: int) -> None:
    statement = a_statement(costs, cap=cap)
    text = rendered(lambda c: tables.show_statement(c, statement, everything=everything), width)
    found = _dollars(text)
    parts = [amount for name in ("trial", "others", "overhead", "idle") for amount in found.get(name, [])]
    assert sum(parts) == found["SPENT"][0] == Decimal(statement["spent"]["usd"])
    assert sum(found[name][0] for name in ("SPENT", "held", "left")) == found["CAP"][0]
    assert len(found.get("trial", [])) == (len(costs) if everything else min(len(costs), 15))
    ends = {match.end() for match in re.finditer(r"(?m)^(?!machine|confirmation|finale).*?[\d,]+\.\d{6}\b", text)}
    ends = {end - text.rindex("\n", 0, end) for end in ends}
    assert len(ends) == 1  # the points stand in line
    assert f"= ${Decimal(statement['spent']['usd']):,.6f}" in text


def test_a_statement_shows_an_overrun_and_time_between_runs() -> None:
    machine = {"spans": [{"micros_per_hour": 3_600_000, "ms": 10_000}], "cost": money(10_000)}
    statement = a_statement([500], cap=60_000, overrun=77) | {"machine": machine}
    text = rendered(lambda c: tables.show_statement(c, statement))
    assert _dollars(text)["OVERRUN"] == [Decimal("0.000077")]
    beyond = statement["spent"]["micros"] + 77 - 10_000
    assert f"beyond that: $0.{beyond:06d}" in text


@pytest.mark.parametrize(("width", "encoding"), [(80, "utf-8"), (160, "utf-8"), (80, "ascii")])
def test_the_bar_shows_the_shares_of_the_cap(width: int, encoding: str) -> None:
    text = rendered(VIEWS["status"], width, encoding=encoding)
    drawn = next(line for line in text.splitlines() if line.startswith("["))[1:-1]
    signs = "#=-." if encoding == "ascii" else "█▓░·"
    assert len(drawn) == width - 2
    for sign, share in zip(signs, (0.5, 0.1, 0.2, 0.2), strict=True):
        assert abs(drawn.count(sign) - share * len(drawn)) <= 1.5
    for word in ("spent $0.0300 (50.0 %)", "held $0.0060", "projected $0.0480", "left $0.0240", "cap $0.0600"):
        assert word in text


def test_progress_to_the_next_rung() -> None:
    text = rendered(VIEWS["status"])
    assert "live 62%" in text  # 200 of the 320 tokens between the first two rungs, which the best trial passed
    assert re.search(r"2/5 +waiting", text)


def test_the_status_says_how_forecasts_held() -> None:
    assert "forecasts: 31 of 38 inside their 80 % interval, median error 6 %\n" in rendered(VIEWS["status"])
    assert "forecasts" not in rendered(VIEWS["empty status"])


def test_a_frozen_study_says_so() -> None:
    assert "FROZEN: $0.001234 were used beyond what was held; see: sweep audit words" in rendered(VIEWS["huge status"])


def test_the_spec_can_be_launched_again() -> None:
    spec = {"study": "words", "model": "m" * 200, "search": {"rank": [4, 8], "learning_rate": {"low": 1e-5}}}
    facts = a_plan(1_000_000)[1]
    text = rendered(lambda c: tables.show_spec(c, "words", spec, facts))
    assert yaml.safe_load(text) == spec
    assert "#   train: 2,000 rows, 40,000 tokens" in text and "135,000,000 parameters" in text


def test_the_plan_says_what_the_cap_is_worth() -> None:
    """Proves that the phases add up to the cap and that what a plan rests on is said; nothing is searched by full
    training where the spec does not ask for it."""
    text = rendered(lambda c: planned(c, 60_000_000, seeds=2))
    for words in ("$60.00, never more: 16 h 40 min", "$3.60/hour, from the spec", "from priors: nothing was measured"):
        assert words in text
    amounts = re.findall(r"^(\w+) +\$([\d.]+) +[\d.]+ %", text, re.MULTILINE)
    found = {name: Decimal(amount) for name, amount in amounts}
    phases = [found[name] for name in ("search", "confirmation", "overhead", "left")]
    assert abs(sum(phases) - found["CAP"]) <= Decimal("0.03"), "each is rounded to a cent"
    assert re.search(r"^half the cap +\$30\.00 ", text, re.M) and re.search(r"^twice the cap +\$120\.00 ", text, re.M)
    assert "meter runs on after the sweep" in text
    assert "meter runs on" not in rendered(lambda c: planned(c, 60_000_000, "poweroff", seeds=2))


def test_the_plan_warns_of_what_cannot_be_paid() -> None:
    """Proves that a cap under a whole run, and a reserve under the confirmation, are named with what would fit."""
    assert "WARNING: the cap pays for no whole run" in rendered(lambda c: planned(c, 60, seeds=0))
    text = " ".join(rendered(lambda c: planned(c, 20_000, seeds=3), 160).split())
    assert re.search(
        r"WARNING: the best configuration of each method over 3 seeds takes \$[\d.]+, the reserve is", text
    )
    assert "it would fit with" in text and "fewer endgame.seeds" in text
    assert "WARNING" not in rendered(lambda c: planned(c, 60_000_000, seeds=3))
