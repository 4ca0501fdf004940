"""Readers of the unpacked source packages: each gives every example a task could take.

They keep the order of the source and choose nothing at random; `build_extracts` does that.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from icm_ray.suites.text import TEXT


@dataclass(frozen=True)
class Candidate:
    """An example a split may take.

    Args:
        text: What the model reads.
        target: Class index or number.
        document: What it was cut from; a document stays in one split.
        stratum: Documents are dealt to the splits, and examples drawn, evenly over strata.
        answer: What a generation should say.
        pair: A second text that is read with the first; empty: none.
    """

    text: str
    target: float
    document: str
    stratum: str = ""
    answer: str = ""
    pair: str = ""

    @property
    def asked(self) -> str:
        """All that is read: what makes two examples the same."""
        return f"{self.text}\n{self.pair}" if self.pair else self.text


@dataclass(frozen=True)
class Synset:
    """A synset of WordNet: its lexicographer class, lemmas, definition and pointers.

    Attributes:
        offset: Its place in the file, which is its name.
        supersense: Lexicographer class, counted from the first one of its part of speech.
        lemmas: Its words, the commonest first.
        definition: Its gloss without examples.
        pointers: The mark and target of each pointer to a synset.
    """

    offset: str
    supersense: int
    lemmas: tuple[str, ...]
    definition: str
    pointers: tuple[tuple[str, str], ...]

    @property
    def lemma(self) -> str:
        """The first lemma."""
        return self.lemmas[0]

    @property
    def parents(self) -> tuple[str, ...]:
        """Its hypernyms."""
        return tuple(target for mark, target in self.pointers if mark in ("@", "@i"))


PARTS = {"adj": ("a", 0), "adv": ("r", 2), "noun": ("n", 3), "verb": ("v", 29)}
"""Mark of a part of speech, and number of its first lexicographer file, such as noun.Tops; the
others follow."""

LINES_PER_FILE = 60
LINE_LETTERS = range(15, 81)
"""Shorter lines say too little, longer ones are mostly data."""
BLANK = "___"
STRESSED_SYLLABLES = 3
"""Words of fewer syllables are nearly always stressed on the first."""
NOT_CPYTHON = ("site-packages", "test")
"""Installed packages; and tests, whose lines are mostly alike."""
FOREIGN_NOTICE = re.compile(r"Permission to use|All rights reserved|GNU ")
"""Files under another notice than CPython's own are left out."""

PASSAGE_WORDS = 40
PASSAGES_PER_SPEECH = 60
SPEECHES_PER_STRATUM = 10

STEM_LETTERS = 6


def read_synsets(wordnet: Path, part: str = "noun") -> dict[str, Synset]:
    """Return the synsets of a folder with WordNet's `data.noun`, `data.verb`, ..., by offset."""
    mark, first = PARTS[part]
    synsets = {}
    for line in (wordnet / f"data.{part}").read_text(encoding="latin-1").splitlines():
        if line.startswith(" "):  # the licence at the head of the file
            continue
        data, _, gloss = line.partition(" | ")
        fields = data.split(" ")
        words = 2 * int(fields[3], 16)
        pointers = fields[4 + words + 1 :]
        synsets[fields[0]] = Synset(
            offset=fields[0],
            supersense=int(fields[1]) - first,
            # An adjective may say in brackets where it stands.
            lemmas=tuple(
                re.sub(r"\(\w+\)$", "", word).replace("_", " ")
                for word in fields[4 : 4 + words : 2]
            ),
            # Examples of use stand in quotes after the definition and hold the lemma.
            definition=re.split(r'[;:,]?\s*"', gloss, maxsplit=1)[0].strip(" ;"),
            pointers=tuple(
                (pointers[i], pointers[i + 1])
                for i in range(0, 4 * int(fields[4 + words]), 4)
                if pointers[i + 2] == mark
            ),
        )
    return synsets


def depths(synsets: Mapping[str, Synset]) -> dict[str, int]:
    """Return the length of the shortest way from each synset up to `entity`."""
    known: dict[str, int] = {}

    def depth(offset: str) -> int:
        if offset not in known:
            parents = synsets[offset].parents
            known[offset] = 1 + min(map(depth, parents)) if parents else 0
        return known[offset]

    return {offset: depth(offset) for offset in synsets}


def supersense_candidates(synsets: Mapping[str, Synset]) -> Iterator[Candidate]:
    """Yield each definition with its lexicographer class."""
    names = TEXT.tasks["supersense"].classes
    for synset in synsets.values():
        if synset.definition:
            name = names[synset.supersense]
            yield Candidate(synset.definition, synset.supersense, synset.offset, name)


def depth_candidates(synsets: Mapping[str, Synset]) -> Iterator[Candidate]:
    """Yield each `lemma: definition` with its depth in the hypernym hierarchy."""
    depth = depths(synsets)
    for synset in synsets.values():
        if synset.definition:
            text = f"{synset.lemma}: {synset.definition}"
            yield Candidate(text, depth[synset.offset], synset.offset)


def modules(library: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield the path of each module of CPython's `Lib` under its own licence, with its lines."""
    for path in sorted(library.rglob("*.py")):
        document = path.relative_to(library)
        source = path.read_text(encoding="utf-8", errors="replace")
        if document.parts[0] in NOT_CPYTHON or FOREIGN_NOTICE.search(source) or "\ufffd" in source:
            continue
        lines = [line.strip() for line in source.splitlines()]
        yield document.as_posix(), [line for line in lines if len(line) in LINE_LETTERS]


def keyword_candidates(library: Path) -> Iterator[Candidate]:
    """Yield lines of CPython's `Lib` whose first word, a keyword, is blanked, with the keyword."""
    names = TEXT.tasks["keyword"].classes
    for document, lines in modules(library):
        for line in lines:
            word, _, rest = line.partition(" ")
            if word in names:
                yield Candidate(f"{BLANK} {rest.strip()}", names.index(word), document, word)


def passages(speeches: Path, size: int) -> Iterator[tuple[str, dict, list[str]]]:
    """Yield the name of each State of the Union address, what is known of it, and its passages.

    Args:
        speeches: Folder of the addresses.
        size: Words of a passage; they come in their order.
    """
    for path in sorted(speeches.glob("[12]*.json")):
        speech = json.loads(path.read_text(encoding="utf-8"))
        words = speech["text"].split()
        starts = range(0, len(words) - size + 1, size)
        yield path.stem, speech, [" ".join(words[start : start + size]) for start in starts]


def year_candidates(speeches: Path) -> Iterator[Candidate]:
    """Yield passages of State of the Union addresses with their year."""
    for number, (document, speech, texts) in enumerate(passages(speeches, PASSAGE_WORDS)):
        stratum = f"{number // SPEECHES_PER_STRATUM:02d}"
        for text in texts:
            yield Candidate(text, speech["year"], document, stratum)


def syllable_candidates(dictionary: Path) -> Iterator[Candidate]:
    """Yield the words of CMUdict's `dict.txt` with their number of syllables."""
    for word, vowels in _pronunciations(dictionary):
        yield Candidate(word, len(vowels), word[:STEM_LETTERS])


def stress_candidates(dictionary: Path) -> Iterator[Candidate]:
    """Yield longer words of CMUdict with the syllable that bears the primary stress."""
    names = TEXT.tasks["stress"].classes
    for word, vowels in _pronunciations(dictionary):
        stressed = [place for place, vowel in enumerate(vowels) if vowel.endswith("1")]
        if len(vowels) >= STRESSED_SYLLABLES and len(stressed) == 1:
            index = min(stressed[0], len(names) - 1)
            yield Candidate(word, index, word[:STEM_LETTERS], names[index])


def _pronunciations(dictionary: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield each plain word with its vowels, one a syllable, marked 0 to 2 for stress."""
    for line in dictionary.read_text(encoding="utf-8").splitlines():
        word, _, phones = line.partition("  ")
        vowels = [phone for phone in phones.split() if phone[-1].isdigit()]
        # Variants such as WORD(1), possessives and spelled-out marks are left out.
        if re.fullmatch(r"[A-Z]{3,}", word) and vowels:
            yield word.lower(), vowels
