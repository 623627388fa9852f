"""A study's objective reaches its workers, and what they measure by it comes back."""

from __future__ import annotations

from pathlib import Path

from studies import read, sweep, write_spec

from trainers.messages import Evaluated, load_job, parse_event


def test_the_objective_reaches_the_worker(tmp_path: Path) -> None:
    """On recorded curves: the job names methods, metric and length of texts; each trial's end is measured by it."""
    spec = write_spec(tmp_path, cap="$1", timings=True, trials=3)
    objective = "objective={metric: exact_match, max_new_tokens: 7}"
    sweep("launch", str(spec), "--yes", "--set", objective, cwd=tmp_path)
    folder = Path(read(tmp_path)["workers"][0].folder)
    job = load_job((folder / "job.json").read_text())
    assert (job.methods, job.metric, job.choices, job.max_new_tokens) == (["lora"], "exact_match", None, 7)
    events = [parse_event(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    judged = [event for event in events if isinstance(event, Evaluated)]
    assert any(event.final for event in judged)
    for event in judged:
        assert (event.metric is not None) == (event.metric_error is not None) == event.final
        assert event.scores == {}
    best = max((event for event in judged if event.metric is not None), key=lambda event: event.metric or 0)
    shown = sweep("best", "words", cwd=tmp_path).stdout
    assert f"exact_match {best.metric:.4f}, standard error" in shown
    assert f"{best.metric:.4f}" in sweep("trials", "words", cwd=tmp_path).stdout
    (ended,) = [line for line in read(tmp_path)["log"] if f"trial {best.trial} completed" in line]
    assert f"loss {best.full_loss:.4f}, metric {best.metric:.4f}" in ended
