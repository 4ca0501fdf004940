"""Which rows go into which split: as a column says, or drawn by hash over whole documents."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from icm_ray.errors import InputError, did_you_mean
from icm_ray.suites.tasks import SPLITS

SHARES = {"calibration": 0.15, "validation": 0.15, "test": 0.3}
"""Of the documents, where a suite says nothing; the rest train."""
MOST = {"calibration": 512, "validation": 512, "test": 1024}
"""Rows of a split that a suite says nothing of."""
DRAWN_FIRST = ("test", "validation", "calibration", "train")
"""A larger calibration split moves no row that is tested."""

Wanted = Mapping[str, int | str]
"""By split: how many rows, or the column's value that stands for it."""


class Key(NamedTuple):
    """What decides where a row goes: its column's split, and hashes of document and content."""

    split: str | None
    document: bytes
    content: bytes


def key_of(seed: int, split: str | None, document: str, content: str) -> Key:
    """Return a row's key; its hashes are the same on every machine."""
    parts = (f"{seed}\0{part}".encode("utf-8", "surrogatepass") for part in (document, content))
    return Key(split, *(hashlib.sha256(part).digest()[:16] for part in parts))


def draw(keys: Sequence[Key], wanted: Wanted) -> dict[str, list[int]]:
    """Return the rows of each split by their positions.

    Rows that a column names keep its order; rows that are drawn come in the order of their
    hashes, so that neither depends on how often the other is asked for. No document is in two
    splits that were drawn.

    Raises:
        InputError: a word that the column does not hold, or too few rows; all of them.
    """
    has_column = any(key.split is not None for key in keys)
    problems: list[str] = []
    places: dict[str, list[int]] = {name: [] for name in SPLITS}
    pool = list(range(len(keys)))
    if has_column:
        places = {name: _named(keys, name, wanted.get(name), problems) for name in SPLITS}
        problems += _overlaps(keys, wanted, places)
        pool, places["train"] = places["train"], []
    else:
        problems += [
            f"splits.{name}: {value!r} but there is no split column. Name it, or give a number."
            for name, value in wanted.items()
            if isinstance(value, str)
        ]
    if not problems:
        rest = _Documents(keys, pool, in_order=has_column)
        shared = len(rest.documents)
        for name in DRAWN_FIRST:
            if not places[name]:
                places[name] = rest.take(name, wanted.get(name), shared, problems)
    problems += [
        f"splits.{name}: {value} rows are wanted but {len(places[name])} are there. Ask for "
        "fewer, or add rows."
        for name, value in wanted.items()
        if isinstance(value, int) and len(places[name]) < value
    ]
    if problems:
        raise InputError(dict.fromkeys(problems))
    return {
        name: places[name][:value] if isinstance(value := wanted.get(name), int) else places[name]
        for name in SPLITS
    }


def _named(
    keys: Sequence[Key], name: str, value: int | str | None, problems: list[str]
) -> list[int]:
    """Return the rows that the column says are of a split."""
    word = value if isinstance(value, str) else name
    rows = [place for place, key in enumerate(keys) if key.split == word]
    if isinstance(value, str) and not rows:
        words = sorted({str(key.split) for key in keys})
        problems.append(
            f"splits.{name}: {value!r} but the split column holds {', '.join(words[:9])}."
            f"{did_you_mean(value, words)}"
        )
    return rows


def _overlaps(
    keys: Sequence[Key], wanted: Wanted, places: Mapping[str, Sequence[int]]
) -> list[str]:
    """Say which splits are the same rows, or that the column's words are none of them."""
    words: dict[str, list[str]] = {}
    for name in SPLITS:
        if places[name]:
            value = wanted.get(name)
            words.setdefault(value if isinstance(value, str) else name, []).append(name)
    if not words:
        found = ", ".join(sorted({str(key.split) for key in keys})[:9])
        return [f"splits: the column holds {found} but {', '.join(SPLITS)} are read. Name them."]
    return [
        f"splits: {' and '.join(names)} are both {word!r} but they share no row. Give a number "
        "instead, and its rows are drawn from train."
        for word, names in words.items()
        if names[1:]
    ]


class _Documents:
    """Rows that are not in any split yet, document by document, in the order of their hashes."""

    def __init__(self, keys: Sequence[Key], pool: Sequence[int], *, in_order: bool) -> None:
        self.documents: dict[bytes, list[int]] = {}
        self.in_order = in_order  # what the column left to train keeps the file's order
        for place in sorted(pool, key=lambda place: (keys[place].document, keys[place].content)):
            self.documents.setdefault(keys[place].document, []).append(place)

    def take(
        self, name: str, value: int | str | None, shared: int, problems: list[str]
    ) -> list[int]:
        """Take a split's documents out of the rest, and return its rows."""
        if name == "train":
            rows = [place for rows in self.documents.values() for place in rows]
            return sorted(rows) if self.in_order else rows
        count = value if isinstance(value, int) else None
        if count is None and not self.documents and not shared:
            return []
        if count is None and shared < len(SPLITS):
            problems.append(
                f"splits: {shared} documents but {len(SPLITS)} or more are expected, one a split. "
                "Add rows, or say what each split is."
            )
            return []
        rows: list[int] = []
        documents = int(SHARES[name] * shared) or 1 if count is None else shared
        limit = MOST[name] if count is None else count
        while self.documents and documents and len(rows) < limit:
            rows += self.documents.pop(next(iter(self.documents)))
            documents -= 1
        return rows[:limit]
