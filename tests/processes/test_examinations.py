"""Examinations over the wire: of trials and of the base, charged as they must be; they alone open the test rows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from process_bench import Bench, config, write_rows

from trainers.messages import Admit, BaseExamined, Drop, EvaluateBase, Evaluated, ExamineBase, Stop

TRAINERS = Path(__file__).parents[1] / "trainers"
# In a process of its own: this one stays without torch.
PREPARE = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import tiny
from transformers import AutoTokenizer
from trainers.data import prepare
tiny.save_model(Path("tiny"))
for metric in ("exact_match", "metric_of_mine:late"):
    prepare(AutoTokenizer.from_pretrained("tiny"), train="rows.jsonl", folder=Path(metric.partition(":")[0]).resolve(),
            validation=0.2, test=0.1, max_tokens=64, seed=3, model="tiny", retention="rows.jsonl", metric=metric)
"""
# Looked for in the folder where the study was launched, which is not where the worker runs.
METRIC = """
def late(prompt, generated, completion):
    if generated != completion:
        raise ValueError(f"no {generated!r}\\nnor any other")
    return 1.0
"""
SETTINGS: dict[str, Any] = {"alpha": 8.0, "targets": "attention", "examples": 24, "rank": 4}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model and rows prepared for two metrics."""
    root = tmp_path_factory.mktemp("prepared")
    write_rows(root / "rows.jsonl")
    (root / "metric_of_mine.py").write_text(METRIC)
    subprocess.run([sys.executable, "-c", PREPARE, str(TRAINERS)], check=True, cwd=root)
    return root


def start(bench: Bench, prepared: Path, metric: str, **changes: Any) -> None:
    """Starts a worker on the tiny model and waits until it is ready."""
    real = {"model": str(prepared / "tiny"), "data": str(prepared / metric.partition(":")[0]), "device": "cpu"}
    more = {"methods": ["lora"], "metric": metric, "max_new_tokens": 4, "threads": 1, **changes}
    bench.start(**real, **more, slots=2, paid_ms=180_000, work_ms=170_000)
    bench.wait_event("ready", timeout_s=60)


def admit(bench: Bench, number: int, *, examine: bool, until: int | None = None, **changes: Any) -> None:
    """Sends an Admit."""
    command = Admit(
        fence=1,
        config=config(number, **{**SETTINGS, **changes}),
        attempt=f"a{number}",
        folder=str(bench.root / f"trial {number}"),
        until_tokens=until,
        examine=examine,
    )
    assert bench.launcher.send(bench.folder, command)


def test_test_rows_are_opened_by_examinations_alone(make_bench: Callable[..., Bench], prepared: Path) -> None:
    """A search goes through without the test files. Once they are there, base and trial are scored on every row.

    The base is examined while a trial stands in a slot, charged to `load`, and the second time said from memory.
    """
    bench = make_bench()
    moved = [prepared / "exact_match" / name for name in ("test.safetensors", "test-texts.jsonl")]
    for path in moved:
        path.rename(path.with_name(f"away-{path.name}"))
    start(bench, prepared, "exact_match")
    bench.launcher.send(bench.folder, EvaluateBase(fence=1))
    bench.wait_event("base_evaluated", timeout_s=60)
    admit(bench, 0, until=100, examine=True)
    admit(bench, 1, examine=False)
    found = {(e.trial, e.final): e for e in (bench.wait_event("evaluated", n, timeout_s=60) for n in (1, 2))}
    rung, end = found[0, False], found[1, True]
    assert (rung.metric, rung.metric_error, rung.scores) == (None, None, {})
    assert (end.metric is not None, end.metric_error is not None, end.scores) == (True, True, {})
    for path in moved:
        path.with_name(f"away-{path.name}").rename(path)
    before = bench.poll()[-1].usage
    bench.launcher.send(bench.folder, ExamineBase(fence=1))
    base: BaseExamined = bench.wait_event("base_examined", timeout_s=60)
    assert {name: len(scores.nll) for name, scores in base.scores.items()} == {"test": 6, "retention": 60}
    assert [scores.metric is None for scores in base.scores.values()] == [False, True]
    assert base.majority.keys() == {"test"}
    assert base.examine_ms > 0 and base.usage["load"] - before["load"] >= base.examine_ms - 1
    assert base.usage["trial:0"] == before["trial:0"]
    bench.launcher.send(bench.folder, Drop(fence=1, trial=1))
    admit(bench, 2, examine=True)
    examined: Evaluated = bench.wait_event("evaluated", 3, timeout_s=60)
    assert (examined.trial, examined.final) == (2, True)
    assert {name: scores.tokens for name, scores in examined.scores.items()} == {
        name: scores.tokens for name, scores in base.scores.items()
    }
    assert sum(examined.scores["test"].nll) != sum(base.scores["test"].nll)
    assert examined.examine_ms > 0
    assert abs(examined.usage["trial:2"] - examined.train_ms - examined.evaluate_ms - examined.examine_ms) < 25
    bench.launcher.send(bench.folder, ExamineBase(fence=1))
    again: BaseExamined = bench.wait_event("base_examined", 2, timeout_s=60)
    assert (again.scores, again.majority, again.examine_ms) == (base.scores, base.majority, 0)
    bench.launcher.send(bench.folder, Stop(fence=1, within_ms=20_000))
    assert bench.wait_ended().exit_code == 0


def test_a_metric_that_fails_fails_the_trial_and_not_the_worker(
    make_bench: Callable[..., Bench], prepared: Path
) -> None:
    """The user's function is found where the study was launched; its error is one line, and the next trial trains."""
    bench = make_bench()
    start(bench, prepared, "metric_of_mine:late")
    admit(bench, 0, examine=False)
    failed = bench.wait_event("failed", timeout_s=60)
    assert (failed.trial, failed.code) == (0, "error")
    assert failed.message.startswith("metric metric_of_mine:late failed on the prompt ")
    assert "ValueError: no " in failed.message and "\n" not in failed.message
    admit(bench, 1, until=100, examine=False)
    assert bench.wait_event("evaluated", timeout_s=60).trial == 1
    bench.launcher.send(bench.folder, ExamineBase(fence=1))
    base = bench.wait_event("base_examined", timeout_s=60)
    assert (base.scores["test"].metric, len(base.scores["test"].nll), base.majority) == (None, 6, {})
    assert "the base model: metric metric_of_mine:late failed" in (bench.folder / "worker.log").read_text()


SCORED = {"test_rows": 50, "retention_rows": 10, "row_spread": 0.5, "seed_spread": 0.1, "forgetting": 0.2}


def replayed(bench: Bench, seeds: tuple[int, ...]) -> tuple[BaseExamined, list[Evaluated]]:
    """What a replayed study of a metric says of the base and of one trial a seed, on a file of timings."""
    bench.start(timings=str(bench.root / "timings.json"), work_ms=10**6, paid_ms=1, metric="exact_match")
    bench.launcher.send(bench.folder, ExamineBase(fence=1))
    base = bench.wait_event("base_examined")
    for place, seed in enumerate(seeds, start=1):
        admit(bench, place, examine=True, seed=seed, examples=200, rank=8)
        bench.wait_event("evaluated", place)
        bench.launcher.send(bench.folder, Drop(fence=1, trial=place))
        bench.wait_event("dropped", place)
    return base, [event for event in bench.poll() if isinstance(event, Evaluated)]


def test_replayed_trials_have_scores_of_their_curves(make_bench: Callable[..., Bench]) -> None:
    """Over its rows a trial's scores mean its loss, row by row they are its seed's; retention is unlearnt as scripted.

    Examining moves a meter that runs on timings by its tokens, and two lives say the same.
    """
    base, found = replayed(make_bench(**SCORED), (1, 2, 1))
    again = replayed(make_bench(**SCORED), (1, 2, 1))
    assert (again[0].scores, again[0].at_ms) == (base.scores, base.at_ms)
    assert [(e.scores, e.metric, e.at_ms) for e in again[1]] == [(e.scores, e.metric, e.at_ms) for e in found]

    def loss(scores: Any) -> float:
        return sum(scores.nll) / sum(scores.tokens)

    assert loss(base.scores["test"]) == loss(base.scores["retention"]) == pytest.approx(4.0)
    for event in found:
        test, retention = event.scores["test"], event.scores["retention"]
        assert loss(test) == pytest.approx(event.loss)
        assert loss(retention) == pytest.approx(4.0 + 0.2 * (4.0 - event.loss))
        each = [nll / tokens for nll, tokens in zip(test.nll, test.tokens, strict=True)]
        assert max(each) - min(each) > 0.2 * event.loss
        assert test.metric is not None and set(test.metric) == {0.0, 1.0} and retention.metric is None
        assert event.metric_error is not None
    one, two, repeated = found
    assert one.scores == repeated.scores != two.scores
    assert base.examine_ms == round(1000 * 0.0007 * (500 + 100))
    assert one.examine_ms == pytest.approx(base.examine_ms + 1000 * 0.0007 * 80, abs=1)
