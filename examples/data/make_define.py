"""Makes define.jsonl: 2,000 dictionary definitions from the WordNet 3.0 database files.

Runnable from the repository root, on a machine that has the database (`apt-get install wordnet-base`):

    python examples/data/make_define.py /usr/share/wordnet

The same database gives the same file, byte for byte: rows are picked and ordered by a hash of the seed and the word,
so nothing depends on the version of Python or on the order of the database.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

PARTS_OF_SPEECH = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}

# Lower-case words, or collocations of up to three words: a capital, a digit or a full stop marks a name or a formula.
WORD = re.compile(r"[a-z]{2,}(?:[ -][a-z]+){0,2}")

# WordNet counts how often a sense was met in running text. Words met only once are mostly rare: coccidiosis.
MINIMUM_COUNT = 2
SENSE_TYPES = {"1": "noun", "2": "verb", "3": "adj", "4": "adv", "5": "adj"}

# A demonstration should not teach slurs, and WordNet labels them in the gloss.
UNWANTED = re.compile(
    r"\b(slurs?|offensive|obscene|obscenity|disparag\w+|derogatory|vulgar|taboo|sexual\w*|copulat\w+|prostitut\w+|rape"
    r"|genital\w*|penis|vagina|whore)\b"
)


def clean_gloss(gloss: str) -> str | None:
    """Returns the definition without its example sentences, or None where it does not make a good row."""
    # Example sentences are quoted and follow the definition; what comes after the first quotation mark is left out.
    definition = re.split(r'[;:,]?\s*"', gloss, maxsplit=1)[0]
    definition = re.sub(r"\s+", " ", re.sub(r"\s+([;,])", r"\1", definition)).strip(" ;:,")
    if definition.count("(") != definition.count(")") or not 4 <= len(definition.split()) <= 30:
        return None
    return None if UNWANTED.search(definition) else definition


def read_synsets(path: Path) -> dict[str, tuple[list[str], str]]:
    """Reads data.noun and its like: offset -> (words as spelled, gloss), without individual people and places."""
    synsets = {}
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("  "):  # the licence stands at the top of every file
                continue
            head, _, gloss = line.partition(" | ")
            fields = head.split(" ")
            count = int(fields[3], 16)
            pointers = fields[4 + 2 * count :]
            if "@i" in pointers:  # an instance of something: Paris, not city
                continue
            # Adjectives carry their position as a suffix, such as galore(ip).
            words = [re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * count : 2]]
            synsets[fields[0]] = (words, gloss)
    return synsets


def read_counts(path: Path) -> Counter[tuple[str, str]]:
    """Reads cntlist.rev: (lemma, database file) -> how often its commonest sense was met in tagged texts."""
    counts: Counter[tuple[str, str]] = Counter()
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            key, sense, count = line.split()
            lemma, _, rest = key.partition("%")
            if sense == "1":
                counts[lemma, SENSE_TYPES[rest[0]]] += int(count)
    return counts


def candidates(folder: Path) -> Iterator[tuple[str, str, str]]:
    """Yields (word, part of speech, definition of its commonest sense) for words that are common enough."""
    counts = read_counts(folder / "cntlist.rev")
    for suffix, name in PARTS_OF_SPEECH.items():
        synsets = read_synsets(folder / f"data.{suffix}")
        with (folder / f"index.{suffix}").open(encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("  "):
                    continue
                fields = line.split()
                # The line ends with the word's senses, the commonest first.
                first = fields[-int(fields[2])]
                if counts[fields[0], suffix] < MINIMUM_COUNT or first not in synsets:
                    continue
                word = fields[0].replace("_", " ")
                words, gloss = synsets[first]
                definition = clean_gloss(gloss)
                if definition and word in words and WORD.fullmatch(word):
                    yield word, name, definition


def pick(folder: Path, rows: int, seed: int) -> list[tuple[str, str, str]]:
    """Picks rows so that no word and no definition comes twice: synonyms would leak training rows into the test."""
    pool = sorted(
        candidates(folder), key=lambda row: hashlib.sha256(f"{seed}\0{row[0]}\0{row[1]}".encode()).hexdigest()
    )
    words: set[str] = set()
    definitions: set[str] = set()
    picked = []
    for row in pool:
        if row[0] in words or row[2] in definitions:
            continue
        words.add(row[0])
        definitions.add(row[2])
        picked.append(row)
        if len(picked) == rows:
            return picked
    raise SystemExit(f"{folder} gives {len(picked)} rows only, not {rows}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wordnet", type=Path, help="the folder with data.noun, index.noun, cntlist.rev and the others")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("define.jsonl"))
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    picked = pick(arguments.wordnet, arguments.rows, arguments.seed)
    with arguments.output.open("w", encoding="utf-8", newline="\n") as out:
        for word, name, definition in picked:
            row = {"prompt": f"Define the word: {word} ({name})\n", "completion": definition}
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
    print(f"{arguments.output}: {len(picked)} rows,", dict(Counter(name for _, name, _ in picked)))


if __name__ == "__main__":
    main()
