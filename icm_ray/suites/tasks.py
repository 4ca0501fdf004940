"""What a task is, and what its examples are."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from icm_ray.config import TaskKind
from icm_ray.inputs import Text, image_bytes
from icm_ray.suites.own_scorer import OwnScorer

if TYPE_CHECKING:
    import numpy as np

Kind = TaskKind
"""What an example asks for: a class or a number, one of them for each patch of an image, boxes
around things, one of several choices, the next tokens of a text, or an answer in words."""

FIDELITY = "fidelity"
METRICS: Mapping[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "macro_f1", FIDELITY),
    "multiple_choice": ("accuracy", FIDELITY),
    "regression": ("r2", "rmse", FIDELITY),
    "dense_classification": ("miou", "accuracy"),
    "dense_regression": ("r2", "rmse"),
    "detection": ("map50", "map"),
    "language_modelling": ("token_likelihood", FIDELITY),
    "generation": (
        "rouge_l",
        "exact_match",
        "edit_match",
        "pair_f1",
        "bleu",
        "chrf",
        FIDELITY,
    ),
}
"""What each kind can be scored by, the usual first. Of all but `kinds.ERRORS` larger is better and
1 is perfect, so that a score over the expert's score has a meaning.

`miou`: mean intersection over union of classes. `map50`, `map`: mean over classes of the average
precision of boxes, at an intersection over union of .5, and over .5 to .95 (COCO).
`token_likelihood`: 1 / perplexity, the geometric mean of the tokens' probabilities.
`edit_match`: 1 - edit distance in words / longer length.
`pair_f1`: F1 of the things a caption names, each the two words after an "a".
`rouge_l`: F1 of the longest common subsequence of words. `bleu`, `chrf`: of the corpus, over 100.
`fidelity`: how far the model says what the task's expert says; it needs no labels."""

SPLITS: tuple[str, ...] = ("train", "calibration", "validation", "test")
"""train fits experts; calibration feeds merge methods, which never see its targets; validation
chooses between settings; test is read once, for the numbers that are reported."""


def of_patches(kind: str | None) -> bool:
    """Say whether a head of a kind reads each patch of an image."""
    return kind == "detection" or (kind or "").startswith("dense_")


@dataclass(frozen=True)
class Task:
    """One task: what is predicted, how it is scored, where it comes from.

    Args:
        name: Name in the suite.
        kind: What an example asks for.
        metric: The score of the task, one of `METRICS`.
        classes: Class names in the order of the class index; empty for regression.
        max_tokens: Tokens a text is cut to, which bounds the cost of a batch; images ignore it.
        source: Where the examples were taken from.
        licence: Their licence.
        max_new_tokens: Longest answer of a generation, its end included.
        head: Where the expert's head is: "adapter", "names" or a file; None: where one is found.
        labelled: Whether the examples say what is right.
        expert: Name of the task's adapter; empty: the task's.
        scorer: What scores an answer, if it is the suite's own.
    """

    name: str
    kind: Kind
    metric: str
    classes: tuple[str, ...]
    max_tokens: int
    source: str = ""
    licence: str = ""
    max_new_tokens: int = 0
    head: str | None = None
    labelled: bool = True
    expert: str = ""
    scorer: OwnScorer | None = None

    @property
    def outputs(self) -> int:
        """Return the width of a linear head for this task."""
        return len(self.classes) + 4 if self.kind == "detection" else len(self.classes) or 1

    @property
    def chooses(self) -> bool:
        """Say whether the base's likelihood of some texts decides between them."""
        return self.kind == "multiple_choice" or self.head == "names"

    @property
    def classes_to_choose(self) -> tuple[str, ...]:
        """Return the class names whose likelihood decides, if it does."""
        return self.classes if self.head == "names" else ()

    @property
    def headed(self) -> bool:
        """Say whether experts have a head of their own, besides what the base holds."""
        return self.kind not in ("language_modelling", "generation") and not self.chooses

    @property
    def is_class(self) -> bool:
        """Say whether targets are class indices."""
        return self.kind in ("classification", "dense_classification", "multiple_choice")


@dataclass(frozen=True, eq=False)
class Examples:
    """Texts or images with their targets, in a fixed shuffled order: the first n are a sample.

    Args:
        texts: What is asked, one an example; empty where images are read.
        targets: float64: the class index or the number, shape (examples,), or one for each patch,
            (examples, patches), row by row; NaN if there is none. Of a detection the boxes,
            (examples, most, 5): corners in pixels and class, filled up with boxes of class -1.
        documents: What an example was cut from; no document is in two splits.
        answers: What a generation should say, one string an example; else empty.
        images: uint8, shape (examples, height, width, 3); of different sizes, an array of
            arrays; None where texts are read.
        places: Where each example stands in its file, in words, for messages.
    """

    texts: tuple[Text, ...]
    targets: "np.ndarray"
    documents: tuple[str, ...]
    answers: tuple[str, ...] = ()
    images: "np.ndarray | None" = None
    places: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def inputs(self) -> "tuple[Text, ...] | np.ndarray":
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
            digest = hashlib.sha256()
            for part in image_bytes(self.images):
                digest.update(part)
            digest.update(self.targets.tobytes() + json.dumps(self.documents).encode())
            return digest.hexdigest()
        # repr is the shortest text that gives a float back exactly, NaN included.
        rows = zip(self.texts, map(repr, self.targets.tolist()), self.documents, strict=True)
        digest = hashlib.sha256()
        for row in rows:
            digest.update(json.dumps(row).encode() + b"\n")
        if self.answers:
            digest.update(json.dumps(self.answers).encode())
        return digest.hexdigest()

    def first(self, count: int | None) -> "Examples":
        """Return the first `count` examples; None: all."""
        if count is None or count >= len(self):
            return self
        parts = ("texts", "targets", "documents", "answers", "places")
        cut = {name: getattr(self, name)[:count] for name in parts}
        return replace(self, **cut, images=None if self.images is None else self.images[:count])
