"""What a task is, what its examples are, and how a suite reads them from its data files."""

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from icm_ray.errors import InputError, did_you_mean
from icm_ray.files import sha256_of_file

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

Kind = Literal[
    "classification",
    "regression",
    "dense_classification",
    "dense_regression",
    "language_modelling",
    "generation",
]
"""What an example asks for: a class or a number, one of them for each patch of an image, the next
tokens of a text, or an answer in words."""

Metric = Literal[
    "accuracy", "macro_f1", "r2", "miou", "token_likelihood", "exact_match", "edit_match", "rouge_l"
]
"""Larger is better and 1 is perfect, so that a score over the expert's score has a meaning.

`miou`: mean intersection over union of classes. `token_likelihood`: 1 / perplexity, the geometric
mean of the tokens' probabilities. `edit_match`: 1 - edit distance in words / longer length.
`rouge_l`: F1 of the longest common subsequence of words."""

SPLITS: tuple[str, ...] = ("train", "calibration", "validation", "test")
"""train fits experts; calibration feeds merge methods, which never see its targets; validation
chooses between settings; test is read once, for the numbers that are reported."""


@dataclass(frozen=True)
class Task:
    """One task: what is predicted, how it is scored, where it comes from.

    Args:
        name: Name in the suite and of the data file.
        kind: What an example asks for.
        metric: The score of the task; higher is better, 1 is perfect.
        classes: Class names in the order of the class index; empty for regression.
        max_tokens: Tokens a text is cut to, which bounds the cost of a batch; images ignore it.
        source: Package and version the examples were taken from.
        licence: Licence that permits committing the extract.
        max_new_tokens: Longest answer of a generation, its end included.
    """

    name: str
    kind: Kind
    metric: Metric
    classes: tuple[str, ...]
    max_tokens: int
    source: str
    licence: str
    max_new_tokens: int = 0

    @property
    def outputs(self) -> int:
        """Return the width of a linear head for this task."""
        return len(self.classes) or 1

    @property
    def headed(self) -> bool:
        """Say whether experts have a head of their own, besides what the base holds."""
        return self.kind not in ("language_modelling", "generation")

    @property
    def is_class(self) -> bool:
        """Say whether targets are class indices."""
        return self.kind in ("classification", "dense_classification")


@dataclass(frozen=True, eq=False)
class Examples:
    """Texts or images with their targets, in a fixed shuffled order: the first n are a sample.

    Args:
        texts: One string an example; empty where images are read.
        targets: float64: the class index or the number, shape (examples,), or one for each patch,
            (examples, patches), row by row; NaN if there is none.
        documents: What an example was cut from; no document is in two splits.
        answers: What a generation should say, one string an example; else empty.
        images: uint8, shape (examples, height, width, 3); None where texts are read.
    """

    texts: tuple[str, ...]
    targets: "np.ndarray"
    documents: tuple[str, ...]
    answers: tuple[str, ...] = ()
    images: "np.ndarray | None" = None

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def inputs(self) -> "tuple[str, ...] | np.ndarray":
        """Return what a model reads, without anything it should answer."""
        return self.texts if self.images is None else self.images

    @property
    def labels(self) -> list[Any]:
        """Return what a model should say: answers in words where there are any, else targets."""
        return list(self.answers) or self.targets.tolist()

    @cached_property
    def fingerprint(self) -> str:
        """Return the hex sha256 of everything in its order."""
        if self.images is not None:
            return hashlib.sha256(
                self.images.tobytes() + self.targets.tobytes() + json.dumps(self.documents).encode()
            ).hexdigest()
        # repr is the shortest text that gives a float back exactly, NaN included.
        rows = zip(self.texts, map(repr, self.targets.tolist()), self.documents, strict=True)
        digest = hashlib.sha256()
        for row in rows:
            digest.update(json.dumps(row).encode() + b"\n")
        if self.answers:
            digest.update(json.dumps(self.answers).encode())
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
    """Return the rows of a table as Examples.

    Columns: `document`; `text`, or `image` (PNG bytes); `target`, a number or a list of one for
    each patch, unless the task needs none; `answer` for a generation.
    """
    import numpy as np

    names, rows = table.column_names, table.num_rows
    targets = table["target"].to_pylist() if "target" in names else [float("nan")] * rows
    return Examples(
        texts=tuple(table["text"].to_pylist()) if "text" in names else (),
        targets=np.asarray(targets, dtype=np.float64),
        documents=tuple(table["document"].to_pylist()),
        answers=tuple(table["answer"].to_pylist()) if "answer" in names else (),
        images=np.stack([_pixels(i) for i in table["image"].to_pylist()])
        if "image" in names
        else None,
    )


def _pixels(png: bytes) -> "np.ndarray":
    import numpy as np
    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image.convert("RGB"))
