"""Makes sums.jsonl: 4,000 sums of two or three small numbers from reasoning-gym's generator `chain_sum`.

Runnable from the repository root, with the generator installed (`pip install reasoning-gym==0.1.25`):

    python examples/data/make_sums.py

The same version gives the same file, byte for byte.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import reasoning_gym


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("sums.jsonl"))
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    # Twice as many as wanted, since single digits give few different sums and each is kept once.
    problems = reasoning_gym.create_dataset(
        "chain_sum", size=2 * arguments.rows, seed=arguments.seed, min_terms=2, max_terms=3, min_digits=1, max_digits=2
    )
    rows: dict[str, str] = {problem["question"]: problem["answer"] for problem in problems}
    picked = list(rows.items())[: arguments.rows]
    if len(picked) < arguments.rows:
        raise SystemExit(f"the generator gives {len(picked)} different sums only, not {arguments.rows}")
    with arguments.output.open("w", encoding="utf-8", newline="\n") as out:
        for question, answer in picked:
            out.write(json.dumps({"prompt": question, "completion": f" {answer}"}) + "\n")
    print(f"{arguments.output}: {len(picked)} rows")


if __name__ == "__main__":
    main()
