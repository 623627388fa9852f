"""The tasks that learning curves are recorded on (benchmarks/record.py), of three kinds.

All are made of files in examples/data, under their licences, so that nothing is downloaded:

    define  dictionary definitions, free text: many configurations are nearly as good as the best
    sums    the answer to a sum: a skill that a model this small acquires only with a good configuration
    speech  the part of speech of a word whose definition is given: one of four labels, nearly always clear, so losses
            come close to zero and differ by large factors; few configurations are near the best
"""

from __future__ import annotations

import json
import re
from pathlib import Path

EXAMPLES = Path(__file__).absolute().parents[1] / "examples" / "data"
TASKS = ("define", "sums", "speech")

Text = dict[str, str]
_WORD = re.compile(r"Define the word: (.+) \((noun|verb|adjective|adverb)\)\n")


def rows_of(task: str) -> list[Text]:
    """The rows of a task. Raises ValueError for a row of define.jsonl that is not as expected."""
    name = "sums" if task == "sums" else "define"
    rows: list[Text] = [json.loads(line) for line in (EXAMPLES / f"{name}.jsonl").read_text("utf-8").splitlines()]
    if task != "speech":
        return rows
    found = []
    for row in rows:
        match = _WORD.fullmatch(row["prompt"])
        if match is None:
            raise ValueError(f"define.jsonl: {row['prompt']!r} names no part of speech")
        prompt = f"{match[1]}: {row['completion']}\nPart of speech:"
        found.append({"prompt": prompt, "completion": f" {match[2]}"})
    return found
