"""What a task is, what its examples are, and how a suite reads them from its data files."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from icm_ray.errors import InputError, did_you_mean
from icm_ray.files import sha256_of_file

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

Kind = Literal["classification", "regression"]
Metric = Literal["accuracy", "macro_f1", "r2"]

SPLITS: tuple[str, ...] = ("train", "calibration", "validation", "test")
"""train fits experts; calibration feeds merge methods, which never see its targets; validation
chooses between settings; test is read once, for the numbers that are reported."""


@dataclass(frozen=True)
class Task:
    """One supervised text task: what is predicted, how it is scored, where it comes from.

    Args:
        name: Name in the suite and of the data file.
        kind: Whether the target is a class index or a real number.
        metric: The score of the task; higher is better, 1 is perfect.
        classes: Class names in the order of the class index; empty for regression.
        max_tokens: Tokens a text is cut to, which bounds the cost of a batch.
        source: Package and version the texts were taken from.
        licence: Licence that permits committing the extract.
    """

    name: str
    kind: Kind
    metric: Metric
    classes: tuple[str, ...]
    max_tokens: int
    source: str
    licence: str

    @property
    def outputs(self) -> int:
        """Return the width of a linear head for this task."""
        return len(self.classes) or 1


@dataclass(frozen=True, eq=False)
class Examples:
    """Texts with their targets, in a fixed shuffled order: the first n are a random sample.

    Args:
        texts: One string an example.
        targets: float64, shape (examples,): the class index or the number; NaN if unlabelled.
        documents: What an example was cut from; no document is in two splits.
    """

    texts: tuple[str, ...]
    targets: "np.ndarray"
    documents: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)

    @cached_property
    def fingerprint(self) -> str:
        """Return the hex sha256 of texts, targets and documents in their order."""
        # repr is the shortest text that gives a float back exactly, NaN included.
        rows = zip(self.texts, map(repr, self.targets.tolist()), self.documents, strict=True)
        digest = hashlib.sha256()
        for row in rows:
            digest.update(json.dumps(row).encode() + b"\n")
        return digest.hexdigest()


@dataclass(frozen=True)
class Suite:
    """Tasks on one base model, read from `<folder>/<task>.parquet`.

    Args:
        name: Name in `SUITES`.
        base: Base model, as `prepare_base` takes it.
        tasks: The tasks by name.
        folder: Where the data files are.
    """

    name: str
    base: str
    tasks: Mapping[str, Task]
    folder: Path

    def load(self, task: str, split: str, limit: int | None = None) -> Examples:
        """Return the first `limit` examples of a split, or all of them.

        Raises:
            InputError: There is no such task or split, or fewer examples than `limit`.
        """
        path = self._file(task)
        if split not in SPLITS:
            raise InputError(
                f"suite {self.name!r}: split: {split!r} but expected one of "
                f"{', '.join(SPLITS)}.{did_you_mean(split, SPLITS)}"
            )
        table = read_split(path, split)
        if limit is not None and not 0 < limit <= table.num_rows:
            raise InputError(
                f"suite {self.name!r}: {task}/{split}: {limit} examples were asked for but it "
                f"holds {table.num_rows}. Ask for 1 to {table.num_rows}."
            )
        return to_examples(table.slice(0, limit))

    def fingerprint(self, task: str) -> str:
        """Return the hex sha256 of the task's data file."""
        return sha256_of_file(self._file(task))

    def split_hash(self, task: str, split: str, limit: int | None = None) -> str:
        """Return the hex sha256 of exactly the examples that `load` gives."""
        return self.load(task, split, limit).fingerprint

    def _file(self, task: str) -> Path:
        if task not in self.tasks:
            raise InputError(
                f"suite {self.name!r}: task: {task!r} but expected one of "
                f"{', '.join(self.tasks)}.{did_you_mean(task, self.tasks)}"
            )
        path = self.folder / f"{task}.parquet"
        if not path.is_file():
            raise InputError(f"{path}: no such file. Reinstall the package with its data files.")
        return path


def read_split(path: Path, split: str) -> "pa.Table":
    """Return the rows of one split of a data file, in file order."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path, filters=[("split", "=", split)])
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file ({error}). Restore it.") from None


def to_examples(table: "pa.Table") -> Examples:
    """Return the rows of a table with columns text, target and document as Examples."""
    import numpy as np

    return Examples(
        texts=tuple(table["text"].to_pylist()),
        targets=np.asarray(table["target"].to_pylist(), dtype=np.float64),
        documents=tuple(table["document"].to_pylist()),
    )
