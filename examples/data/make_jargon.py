"""Makes jargon.jsonl: 200 paragraphs of running English text from the Jargon File, to see what training unlearns.

Runnable from the repository root, on a machine that has it (`apt-get install dict-jargon`):

    python examples/data/make_jargon.py /usr/share/dictd/jargon.dict.dz

The same file gives the same rows, byte for byte: they are picked and ordered by a hash of the seed and the text.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

# The File is of its time. A demonstration can do without what is crude in it.
UNWANTED = re.compile(
    r"(?i)\b(fuck\w*|shit\w*|crap\w*|bitch\w*|bastard\w*|damn\w*|hell|suck\w*|screw\w*|sex\w*|porn\w*|masturbat\w*|drug\w*"
    r"|kill\w*|rape\w*|nazi\w*|hitler|slut\w*|whore\w*|piss\w*|turd\w*|ass|asshole\w*|penis\w*|cock\w*|gay\w*|racis\w*"
    r"|religio\w*|muslim\w*|jew\w*|christian\w*|black|negro\w*|indian\w*|girl\w*|women|woman)\b"
)


def paragraphs(text: str) -> Iterator[str]:
    """Yields the paragraphs of all entries without marks of cross-references, those of 40 to 120 words."""
    for block in re.split(r"\n\s*\n", text):
        if not block.startswith("    "):  # the name of an entry, and its pronunciation
            continue
        paragraph = re.sub(r"\s+", " ", re.sub(r"\{\s*([^}]*)\}", r"\1", block)).strip()
        if 40 <= len(paragraph.split()) <= 120 and paragraph[-1] in ".!?" and not UNWANTED.search(paragraph):
            yield re.sub(r"^\[[^]]*\] ", "", paragraph)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jargon", type=Path, help="jargon.dict.dz")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("jargon.jsonl"))
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    with gzip.open(arguments.jargon, "rt", encoding="utf-8") as file:
        pool = set(paragraphs(file.read()))
    picked = sorted(pool, key=lambda text: hashlib.sha256(f"{arguments.seed}\0{text}".encode()).hexdigest())
    picked = picked[: arguments.rows]
    with arguments.output.open("w", encoding="utf-8", newline="\n") as out:
        for text in picked:
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    print(f"{arguments.output}: {len(picked)} of {len(pool)} rows")


if __name__ == "__main__":
    main()
