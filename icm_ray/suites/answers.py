"""What a row says is right: a class, a number, a text, a choice, or numbers for places."""

import math
import re
from collections.abc import Sequence
from typing import Any

from icm_ray.config import TaskFile
from icm_ray.errors import did_you_mean

MEND = "Mend or drop the line."
_HALF_PAIR = re.compile("[\ud800-\udfff]")


class Wrong(Exception):
    """A value that is not what it must be; says which column, what came, what was expected."""


def answer_of(task: TaskFile, name: str, value: Any, choices: Any) -> Any:
    """Return what a row says is right.

    Args:
        task: What is asked.
        name: The column's name.
        value: Its value, which is not null.
        choices: What there was to choose from, if anything.

    Returns:
        A class's index, or its name where no names are known; a number; a text; a choice's index;
        a list of them for places; boxes, each of four corners and a class's index.
    """
    if task.kind == "generation":
        return text_of(name, value)
    if task.kind == "multiple_choice":
        return _index_in(name, value, [str(one) for one in choices or []], "choices")
    if task.kind.startswith("dense_"):
        return _places(task, name, value)
    if task.kind == "detection":
        return _boxes(task, name, value)
    if task.kind == "regression":
        return _number(name, value)
    return _class(task, name, value)


def text_of(name: str, value: Any, *, empty: bool = False) -> str:
    """Return a text that a model can read."""
    if not isinstance(value, str):
        raise Wrong(f"{name}: {short(value)} but a text is expected. {MEND}")
    if not empty and not value.strip():
        raise Wrong(f"{name}: empty but words are expected. {MEND}")
    if half := _HALF_PAIR.search(value):
        raise Wrong(
            f"{name}: half a surrogate pair at character {half.start() + 1} but whole characters "
            f"are expected. {MEND}"
        )
    return value


def short(value: object) -> str:
    """Return a value as it is shown in a message."""
    if value is None:
        return "null"
    text = f"{len(value)} bytes" if isinstance(value, bytes) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _class(task: TaskFile, name: str, value: Any) -> Any:
    if task.classes is not None:
        return _index_in(name, value, task.classes, "classes")
    if isinstance(value, str):
        return text_of(name, value)  # the base may know its index
    return _index(name, value)


def _index_in(name: str, value: Any, known: Sequence[str], what: str) -> int:
    if isinstance(value, str):
        if value not in known:
            raise Wrong(
                f"{name}: {short(value)} is none of the {len(known)} {what}."
                f"{did_you_mean(value, known)} {MEND}"
            )
        return list(known).index(value)
    index = _index(name, value)
    if index >= len(known):
        raise Wrong(f"{name}: {index} but 0 to {len(known) - 1} is expected: an index of {what}.")
    return index


def _index(name: str, value: Any) -> int:
    number = _number(name, value)
    if number < 0 or number != int(number):
        raise Wrong(f"{name}: {short(value)} but an index counted from 0 is expected. {MEND}")
    return int(number)


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Wrong(f"{name}: {short(value)} but a number is expected. {MEND}")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        finite = False
    if not finite:
        raise Wrong(f"{name}: {short(value)} but a finite number is expected. {MEND}")
    return float(value)


def _places(task: TaskFile, name: str, value: Any) -> list[float]:
    if not isinstance(value, list) or not value:
        raise Wrong(f"{name}: {short(value)} but a list of one value a place is expected. {MEND}")
    if isinstance(value[0], list):
        value = [one for row in value for one in (row if isinstance(row, list) else [None])]
    one = _class if task.kind == "dense_classification" else None
    return [float(one(task, name, v)) if one else _number(name, v) for v in value]


def _boxes(task: TaskFile, name: str, value: Any) -> list[list[float]]:
    if not isinstance(value, list):
        raise Wrong(f"{name}: {short(value)} but a list of boxes is expected, [] for none. {MEND}")
    return [_box(task, f"{name}[{number}]", box) for number, box in enumerate(value)]


def _box(task: TaskFile, name: str, value: Any) -> list[float]:
    if not isinstance(value, list) or len(value) != 5:
        raise Wrong(f"{name}: {short(value)} but [x0, y0, x1, y1, class] is expected. {MEND}")
    x0, y0, x1, y1 = corners = [_number(name, one) for one in value[:4]]
    if not (0 <= x0 < x1 and 0 <= y0 < y1):
        raise Wrong(
            f"{name}: {short(value)} but 0 <= x0 < x1 and 0 <= y0 < y1 are expected: left, top, "
            f"right and bottom in pixels. {MEND}"
        )
    return [*corners, float(_class(task, name, value[4]))]
