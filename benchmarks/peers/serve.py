"""One search at a time over a pipe: `PYTHON benchmarks/peers/serve.py optuna | neps | syne_tune | flaml`.

A request is one line of JSON on stdin, its answer one line on stdout; whatever a library prints goes to stderr. The
caller owns the clock and the money (benchmarks/race.py); a search never sees either.

    {"do": "begin", "search", "space", "prior", "seed", "units"}   {"at": [units at which a trial is to be
                                    evaluated], "promotes": whether it resumes earlier trials}
        space: {"choices": {name: [...]}, "learning_rate": [low, high]}; prior: first guesses or null;
        units: parts of a whole run, the resource of multi-fidelity searches
    {"do": "ask", "trial"}          {"config": {...}, "until": unit}, a new trial; {"resume": trial, "until": unit}, an
                                    earlier one goes on from its checkpoint; {"wait": true}, nothing now
    {"do": "took", "trial", "config"}   {}: the row of the table that a new trial got for its configuration
    {"do": "tell", "trial", "unit", "loss", "seconds"}   {"go": whether it goes on to `until`}; a trial that stands at
                                    its `until` leaves its slot

It imports nothing of the project: it runs where the project is not installed.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any, Protocol


class Search(Protocol):
    """What a peer module's `begin(search, space, prior, seed, units)` returns."""

    at: list[int]
    promotes: bool

    def ask(self, trial: int) -> dict[str, Any]:
        """See the module."""

    def took(self, trial: int, config: dict[str, Any]) -> None:
        """See the module."""

    def tell(self, trial: int, unit: int, loss: float, seconds: float) -> bool:
        """See the module."""


def answer(module: Any, search: Search | None, request: dict[str, Any]) -> tuple[Search | None, dict[str, Any]]:
    """Carries one request out; returns the search that is under way, and the answer."""
    match request.pop("do"):
        case "begin":
            search = module.begin(**request)
            assert search is not None
            return search, {"at": search.at, "promotes": search.promotes}
        case "ask" if search is not None:
            return search, search.ask(**request)
        case "took" if search is not None:
            search.took(**request)
            return search, {}
        case "tell" if search is not None:
            return search, {"go": bool(search.tell(**request))}
        case other:
            raise ValueError(f"cannot {other} now")


def main(arguments: list[str]) -> int:
    """Answers until stdin ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path(__file__).absolute().parent))
    module = importlib.import_module(f"{arguments[0]}_peer")
    search: Search | None = None
    for line in sys.stdin:
        search, said = answer(module, search, json.loads(line))
        out.write(json.dumps(said) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
