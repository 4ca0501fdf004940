"""Readers of the unpacked source packages: each gives every example a task could take.

They keep the order of the source and choose nothing at random; `build_extracts` does that.
"""

import json
import re
import textwrap
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
    """

    text: str
    target: float
    document: str
    stratum: str = ""


@dataclass(frozen=True)
class Synset:
    """A noun synset of WordNet: its lexicographer class, first lemma, definition and parents."""

    offset: str
    supersense: int
    lemma: str
    definition: str
    parents: tuple[str, ...]


FIRST_NOUN_FILE = 3
"""Lexicographer file number of noun.Tops; the noun files are consecutive."""

SNIPPET_LINES = 4
SNIPPETS_PER_FILE = 60
PACKAGE_FOLDERS: Mapping[str, tuple[str, ...]] = {
    "email": ("email", "test/test_email"),
    "importlib": ("importlib", "test/test_importlib"),
    "json": ("json", "test/test_json"),
    "regrtest": ("test/libregrtest",),
    "sqlite3": ("sqlite3", "test/test_sqlite3"),
}
FOREIGN_NOTICE = re.compile(r"Permission to use|All rights reserved|GNU ")
"""Files under another notice than CPython's own are left out."""

SECTIONS: Mapping[str, str] = {
    "law": "Genesis,Exodus,Leviticus,Numbers,Deuteronomy",
    "history": "Joshua,Judges,Ruth,1 Samuel,2 Samuel,1 Kings,2 Kings,1 Chronicles,2 Chronicles,"
    "Ezra,Nehemiah,Esther",
    "wisdom": "Job,Psalms,Proverbs,Ecclesiastes,Song of Solomon",
    "major_prophets": "Isaiah,Jeremiah,Lamentations,Ezekiel,Daniel",
    "minor_prophets": "Hosea,Joel,Amos,Obadiah,Jonah,Micah,Nahum,Habakkuk,Zephaniah,Haggai,"
    "Zechariah,Malachi",
    "gospels": "Matthew,Mark,Luke,John",
    "acts": "Acts",
    "epistles": "Romans,1 Corinthians,2 Corinthians,Galatians,Ephesians,Philippians,Colossians,"
    "1 Thessalonians,2 Thessalonians,1 Timothy,2 Timothy,Titus,Philemon,Hebrews,James,1 Peter,"
    "2 Peter,1 John,2 John,3 John,Jude",
    "revelation": "Revelation",
}
VERSE_WORDS = 6
"""Shorter verses ("And God said unto Moses,") say nothing about their section."""

PASSAGE_WORDS = 40
PASSAGES_PER_SPEECH = 60
SPEECHES_PER_STRATUM = 10

STEM_LETTERS = 6


def read_synsets(wordnet: Path) -> dict[str, Synset]:
    """Return the noun synsets of a folder with WordNet's `data.noun`, by offset."""
    synsets = {}
    for line in (wordnet / "data.noun").read_text(encoding="latin-1").splitlines():
        if line.startswith(" "):  # the licence at the head of the file
            continue
        data, _, gloss = line.partition(" | ")
        fields = data.split(" ")
        pointers = fields[4 + 2 * int(fields[3], 16) + 1 :]
        parents = [pointers[i + 1] for i, mark in enumerate(pointers) if mark in ("@", "@i")]
        synsets[fields[0]] = Synset(
            offset=fields[0],
            supersense=int(fields[1]) - FIRST_NOUN_FILE,
            lemma=fields[4].replace("_", " "),
            # Examples of use stand in quotes after the definition and hold the lemma.
            definition=re.split(r'[;:,]?\s*"', gloss, maxsplit=1)[0].strip(" ;"),
            parents=tuple(parents),
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


def stdlib_candidates(library: Path) -> Iterator[Candidate]:
    """Yield snippets of CPython's `Lib` with the package they are from."""
    for index, package in enumerate(TEXT.tasks["stdlib"].classes):
        for folder in PACKAGE_FOLDERS.get(package, (package,)):
            for path in sorted((library / folder).rglob("*.py")):
                source = path.read_text(encoding="utf-8", errors="replace")
                if FOREIGN_NOTICE.search(source) or "\ufffd" in source:
                    continue
                document = path.relative_to(library).as_posix()
                for text in _snippets(source, package):
                    yield Candidate(text, index, document, package)


def _snippets(source: str, package: str) -> Iterator[str]:
    lines = [line.rstrip().expandtabs() for line in source.splitlines() if line.strip()]
    # An import, or the package's own name, would give the answer away.
    lines = [line for line in lines if not re.match(r"\s*(from|import)\s", line)]
    for start in range(0, len(lines) - SNIPPET_LINES + 1, SNIPPET_LINES):
        text = textwrap.dedent("\n".join(lines[start : start + SNIPPET_LINES]))
        if package not in text.lower() and len(re.findall(r"[A-Za-z]{3,}", text)) >= SNIPPET_LINES:
            yield text


def scripture_candidates(dump: Path) -> Iterator[Candidate]:
    """Yield the verses of a `bible -l9999` dump with the section they are from."""
    names = TEXT.tasks["scripture"].classes
    section = {book: name for name in names for book in SECTIONS[name].split(",")}
    book = chapter = ""
    for line in dump.read_text(encoding="ascii").splitlines():
        if verse := re.fullmatch(r"  \d+ (.+)", line):
            text = verse[1].strip()
            if len(text.split()) >= VERSE_WORDS:
                name = section[book]
                yield Candidate(text, names.index(name), chapter, name)
        elif heading := re.fullmatch(r"(.+) \d+", line.strip()):
            book, chapter = heading[1], line.strip()


def year_candidates(speeches: Path) -> Iterator[Candidate]:
    """Yield passages of State of the Union addresses with their year."""
    paths = sorted(speeches.glob("[12]*.json"))
    for number, path in enumerate(paths):
        speech = json.loads(path.read_text(encoding="utf-8"))
        words = speech["text"].split()
        stratum = f"{number // SPEECHES_PER_STRATUM:02d}"
        for start in range(0, len(words) - PASSAGE_WORDS + 1, PASSAGE_WORDS):
            text = " ".join(words[start : start + PASSAGE_WORDS])
            yield Candidate(text, speech["year"], path.stem, stratum)


def syllable_candidates(dictionary: Path) -> Iterator[Candidate]:
    """Yield the words of CMUdict's `dict.txt` with their number of syllables."""
    for line in dictionary.read_text(encoding="utf-8").splitlines():
        word, _, phones = line.partition("  ")
        # Variants such as WORD(1), possessives and spelled-out marks are left out.
        if re.fullmatch(r"[A-Z]{3,}", word):
            syllables = sum(phone[-1].isdigit() for phone in phones.split())
            if syllables:
                word = word.lower()
                yield Candidate(word, syllables, word[:STEM_LETTERS])
