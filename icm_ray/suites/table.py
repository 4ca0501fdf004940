"""One task's data: a table that is read twice, once to check and draw, once to keep what was drawn.

Between the two nothing is held of a row but two hashes, so a table may be larger than memory.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from icm_ray.config import TaskFile
from icm_ray.errors import InputError
from icm_ray.files import sha256_of, sha256_of_file
from icm_ray.inputs import Prompt, Text, Turn
from icm_ray.suites.columns import Columns, Record, columns_of
from icm_ray.suites.drawing import Key, draw, key_of
from icm_ray.suites.images import (
    AnySource,
    Opening,
    asked_with_images,
    astray,
    check_boxes,
    filled_up,
    images_alone,
    paths_of,
    together,
)
from icm_ray.suites.tasks import Examples, of_patches

MAX_PROBLEMS = 10_000
"""After so many a table is not read to its end."""
MAX_TOLD = 20
MAX_CLASSES = 100_000


@dataclass(frozen=True)
class Found:
    """What a look at every row showed.

    Attributes:
        columns: Which columns are read.
        labelled: Whether the rows have answers.
        classes: Names of the classes, or their indices as words, where the suite names none.
        places: Positions of each split's rows among the task's.
        files: Images beside the table that rows name, sorted.
    """

    columns: Columns
    labelled: bool
    classes: tuple[str, ...]
    places: dict[str, list[int]]
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A task's rows.

    Attributes:
        name: The task's.
        task: What suite.yaml says of it.
        source: The file.
        seed: Keys the draw.
        known: Class names of the base, in the head's order.
        is_packaged: Whether the version of the package stands for how the rows are read.
    """

    name: str
    task: TaskFile
    source: AnySource
    seed: int = 0
    known: tuple[str, ...] = ()
    is_packaged: bool = False

    @cached_property
    def fingerprint(self) -> str:
        """What identifies the data and how they are read."""
        if self.is_packaged:  # experts that were made with it name the file's hash
            return self.source.fingerprint
        said = self.task.model_dump(mode="json", exclude={"source", "licence", "expert", "metric"})
        files = [sha256_of_file(self.source.beside(name)) for name in self.found.files]
        return sha256_of([self.source.fingerprint, said, self.seed, *files])

    def records(self, split: str) -> list[Record]:
        """Return a split's rows in their order."""
        return self._kept[split]

    def examples(self, records: Sequence[Record], choices: Sequence[str] = ()) -> Examples:
        """Return rows as examples.

        Args:
            records: The rows.
            choices: Names of the classes, where a language model is asked for one of them.

        Raises:
            InputError: every image that is none, too large, or of another size than must be.
        """
        import numpy as np

        told = self.task.kind == "generation" and self.found.labelled
        targets = [self._target(record.answer) for record in records]
        texts, images, opening = (), None, Opening(self.source, [])
        if self.found.columns.shows:
            found = images_alone(opening, records, of_one_size=of_patches(self.task.kind))
            images = None if opening.problems else together(found)
            if self.task.kind == "detection" and images is not None:
                check_boxes(opening, records, images)
        else:
            asked = asked_with_images(opening, records)
            texts = tuple(_asked(one, choices) for one in asked)
        if opening.problems:
            raise InputError(_told(opening.problems))
        return Examples(
            texts=texts,
            targets=np.asarray(filled_up(targets), dtype=np.float64)
            if self.task.kind == "detection"
            else np.asarray(targets, dtype=np.float64),
            documents=tuple(record.document for record in records),
            answers=tuple(record.answer for record in records) if told else (),
            images=images,
            places=tuple(record.where for record in records),
        )

    @cached_property
    def found(self) -> Found:
        """What a look at every row shows.

        Raises:
            InputError: everything that is wrong with the table.
        """
        problems: list[str] = []
        columns = columns_of(self.task, self.source.columns, problems)
        where = f"{self.source}: "
        if problems:
            raise InputError([f"{self._spec}: {line}" for line in problems])
        seen, files = _Seen(self.task, columns), set[str]()
        for record in self._rows(columns, problems):
            seen.add(record, self.seed)
            named = paths_of(columns, record)
            problems += astray(self.source, columns, record.where, named)
            files.update(named)
        problems += [] if problems else seen.problems(self.known)
        if problems:
            raise InputError([where + line for line in _told(problems)])
        try:
            places = draw(seen.keys, {**self.task.splits})
        except InputError as error:
            raise InputError([f"{self._spec}: {line}" for line in error.problems]) from None
        names = seen.class_names(self.known)
        return Found(columns, seen.labelled, names, places, tuple(sorted(files)))

    @property
    def _spec(self) -> str:
        return f"suite.yaml: tasks.{self.name}"

    @cached_property
    def _kept(self) -> dict[str, list[Record]]:
        """Read the table once more, and keep the rows that were drawn, in the order of the draw."""
        wanted = {
            p: (name, i) for name, own in self.found.places.items() for i, p in enumerate(own)
        }
        kept: dict[str, dict[int, Record]] = {name: {} for name in self.found.places}
        for position, record in enumerate(self._rows(self.found.columns, [])):
            if position in wanted:
                name, place = wanted[position]
                kept[name][place] = record
        return {name: [rows[place] for place in sorted(rows)] for name, rows in kept.items()}

    def _rows(self, columns: Columns, problems: list[str]) -> Iterator[Record]:
        """Yield the task's rows; `problems` gets what is wrong with the others."""
        for where, row in self.source.rows(columns.read):
            if not columns.takes(row):
                continue
            own: list[str] = []
            record = columns.record(where, row, own)
            problems += [f"{where}: {line}" for line in own]
            if len(problems) > MAX_PROBLEMS:
                return
            if record is not None:
                yield record

    def _target(self, answer: Any) -> Any:
        """Return an answer as numbers: what a head is trained and scored by."""
        if answer is None or self.task.kind == "generation":
            return math.nan
        if isinstance(answer, str):
            return float(self.found.classes.index(answer))
        return answer


class _Seen:
    """What the rows showed so far."""

    def __init__(self, task: TaskFile, columns: Columns) -> None:
        self.task, self.columns = task, columns
        self.keys: list[Key] = []
        self.bare: list[str] = []
        self.names: dict[str, str] = {}  # class names that suite.yaml does not know, and a place
        self.highest = -1

    def add(self, record: Record, seed: int) -> None:
        """Look at one more row."""
        content = repr((record.asked, record.answer, *record.images))
        self.keys.append(key_of(seed, record.split, record.document, content))
        answers = record.answer if isinstance(record.answer, list) else [record.answer]
        for answer in answers if self.task.kind.endswith("classification") else ():
            if isinstance(answer, str):
                self.names.setdefault(answer, record.where)
            elif answer is not None:
                self.highest = max(self.highest, int(answer))
        if record.answer is None:
            self.bare.append(record.where)

    @property
    def labelled(self) -> bool:
        """Whether every row had an answer."""
        return self.columns.is_labelled and not self.bare

    def class_names(self, known: Sequence[str]) -> tuple[str, ...]:
        """Return the classes as the suite, the base or their indices name them."""
        if self.task.classes is not None:
            return tuple(self.task.classes)
        if not self.task.kind.endswith("classification"):
            return ()
        return tuple(known) if known else tuple(str(i) for i in range(self.highest + 1))

    def problems(self, known: Sequence[str]) -> list[str]:
        """Return what is wrong with the rows together."""
        if not self.keys:
            chosen = f" with {self.task.where}" if self.task.where else ""
            return [f"no row{chosen} but some are expected. Add rows, or choose others."]
        lines = []
        if self.columns.is_labelled and self.bare and len(self.bare) < len(self.keys):
            lines.append(
                f"{self.bare[0]}: no answer but other rows have one ({len(self.bare)} of "
                f"{len(self.keys)} lack it). Give every row an answer, or none."
            )
        if self.names and not known:
            named = ", ".join(sorted(self.names)[:5])
            lines.append(
                f"{next(iter(self.names.values()))}: answers are names ({named}) but nobody says "
                "in which order. Set classes: in the head's order."
            )
        for name, where in self.names.items():
            if known and name not in known:
                lines.append(f"{where}: {name!r} is none of the base's {len(known)} classes.")
        limit = len(known) if known else MAX_CLASSES
        if self.task.classes is None and self.highest >= limit:
            lines.append(f"a class {self.highest} but 0 to {limit - 1} are expected. Set classes:.")
        return lines


def _told(problems: Sequence[str]) -> list[str]:
    more = len(problems) - MAX_TOLD
    return [*problems[:MAX_TOLD], *([f"{more} more problems."] if more > 0 else [])]


def _asked(asked: Any, choices: Sequence[str]) -> Text:
    """Return what a model is asked; of a language model that chooses, with the choices."""
    if not choices:
        return asked
    if isinstance(asked, Prompt):
        return asked._replace(choices=tuple(choices))
    return Prompt((Turn("user", str(asked)),), choices=tuple(choices))
