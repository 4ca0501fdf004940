"""Readers of the many suite's tasks on one text; the text suite's own six have theirs there.

They keep the order of the source; whatever is drawn is drawn by a keyed hash.
"""

import datetime
import hashlib
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from icm_ray.suites.generation.build_extracts import WORDINGS, worded
from icm_ray.suites.many import MANY
from icm_ray.suites.text.sources import (
    PARTS,
    STEM_LETTERS,
    Candidate,
    Synset,
    modules,
    passages,
)

SIZES = {"train": 1600, "calibration": 1024, "validation": 256, "test": 512}
PASSAGE_WORDS = 24
FIRST_YEAR, DAYS = 1800, 300 * 365
"""Of the dates in words."""
FIRST_PARTY_YEAR = 1854
"""From then on both parties gave addresses."""
SPELLED_LETTERS = range(5, 13)

Part = Mapping[str, Synset]
"""The synsets of a part of speech, by offset."""


def drawn(*parts: object) -> int:
    """Return a number that the parts decide: a draw no version of a random generator changes."""
    digest = hashlib.sha256("\0".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8])


def split_of(document: str) -> str:
    """Return the split of a document, the same in every task; of several, joined by `+`, theirs.

    Raises:
        ValueError: they are of different splits.
    """
    names = {_split_of(part) for part in document.split("+")}
    if len(names) > 1:
        raise ValueError(f"{document}: of {', '.join(sorted(names))} but of one split is expected.")
    return names.pop()


@cache
def _split_of(document: str) -> str:
    place = drawn("split", document) % sum(SIZES.values())
    for name, size in SIZES.items():
        place -= size
        if place < 0:
            return name
    raise AssertionError(document)


def group_candidates(verbs: Part) -> Iterator[Candidate]:
    """Yield each verb's definition with its lexicographer class."""
    names = MANY.tasks["verb_group"].classes
    for offset, verb in verbs.items():
        name = names[verb.supersense]
        yield Candidate(verb.definition, verb.supersense, f"verb {offset}", name)


def part_candidates(parts: Mapping[str, Part]) -> Iterator[Candidate]:
    """Yield definitions with the part of speech of what they define."""
    names = MANY.tasks["part"].classes
    for name, synsets in parts.items():
        for offset, synset in synsets.items():
            document = offset if name == "noun" else f"{name} {offset}"
            yield Candidate(synset.definition, names.index(name), document, name)


def spelling_candidates(parts: Mapping[str, Part]) -> Iterator[Candidate]:
    """Yield plain words as they are, or with two neighbouring letters swapped."""
    names = MANY.tasks["spelling"].classes
    words = plain_words(parts)
    for word in sorted(words):
        if len(word) in SPELLED_LETTERS:
            is_wrong = drawn("spelling", word) % 2
            # The first letters stay, since no typist swaps them unseen.
            place = 1 + drawn("place", word) % (len(word) - 2)
            swapped = word[:place] + word[place + 1] + word[place] + word[place + 2 :]
            if swapped not in words:
                text = swapped if is_wrong else word
                yield Candidate(text, is_wrong, word[:STEM_LETTERS], names[is_wrong])


def plain_words(parts: Mapping[str, Part]) -> frozenset[str]:
    """Return the lemmas of WordNet that are one word of small letters."""
    return frozenset(
        lemma
        for synsets in parts.values()
        for synset in synsets.values()
        for lemma in synset.lemmas
        if re.fullmatch("[a-z]{3,}", lemma)
    )


def package_candidates(library: Path) -> Iterator[Candidate]:
    """Yield lines of CPython's `Lib` with the package they are of."""
    names = MANY.tasks["package"].classes
    for document, lines in modules(library):
        name = document.partition("/")[0]
        if name in names:
            for line in lines:
                # A line that names its package says nothing of how it is written.
                if name not in line.lower():
                    yield Candidate(line, names.index(name), document, name)


def party_candidates(speeches: Path) -> Iterator[Candidate]:
    """Yield passages of State of the Union addresses with the president's party."""
    names = MANY.tasks["party"].classes
    for document, speech, texts in passages(speeches, PASSAGE_WORDS):
        party = speech["party"].lower()
        if speech["year"] >= FIRST_PARTY_YEAR and party in names:
            for text in texts:
                yield Candidate(text, names.index(party), document, party)


def year_candidates(speeches: Path) -> Iterator[Candidate]:
    """Yield passages with their year, a decade a stratum."""
    for document, speech, texts in passages(speeches, PASSAGE_WORDS):
        for text in texts:
            yield Candidate(text, speech["year"], document, str(speech["year"] // 10))


def days() -> Iterator[tuple[datetime.date, str]]:
    """Yield every day of three centuries, each in one of several wordings."""
    first = datetime.date(FIRST_YEAR, 1, 1).toordinal()
    for number in range(first, first + DAYS):
        day = datetime.date.fromordinal(number)
        yield day, worded(day, WORDINGS[drawn("wording", day) % len(WORDINGS)])


def day_candidates() -> Iterator[Candidate]:
    """Yield dates in words with the day of their year."""
    for day, text in days():
        yield Candidate(text, day.timetuple().tm_yday, day.isoformat())


def every_part(read: Mapping[str, Part]) -> dict[str, Part]:
    """Return the synsets that have a definition, by part of speech."""
    return {
        name: {offset: synset for offset, synset in read[name].items() if synset.definition}
        for name in PARTS
    }
