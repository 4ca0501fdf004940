"""Distributions of searched values, written as text: `loguniform(0.05, 2)`, `choice(a, b)`."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from icm_ray.errors import RecipeError

Value = bool | int | float | str | None
"""What a searched name can be set to."""

_CALL = re.compile(r"^\s*(\w+)\s*\((.*)\)\s*$", re.DOTALL)
_WORD = re.compile(r"^[A-Za-z_][\w.:/-]*$")
_CONSTANTS: dict[str, Value] = {"true": True, "false": False, "null": None, "none": None}
FORMS = (
    "uniform(low, high)",
    "quniform(low, high, step)",
    "loguniform(low, high)",
    "int(low, high)",
    "logint(low, high)",
    "choice(a, b, ...)",
)


@dataclass(frozen=True)
class Dimension:
    """The values of one searched name.

    Attributes:
        kind: Real numbers, whole numbers, or one of `choices`.
        low: Smallest number, included.
        high: Largest number, included.
        log: Whether ratios matter rather than differences.
        step: Distance between allowed numbers; None allows all of them.
        choices: Values of a choice.
    """

    kind: Literal["float", "int", "choice"]
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    step: float | None = None
    choices: tuple[Value, ...] = ()

    def suggest(self, trial: Any, name: str) -> Value:
        """Return the value an Optuna trial (or its like) suggests for `name`."""
        if self.kind == "choice":
            return trial.suggest_categorical(name, list(self.choices))
        if self.kind == "int":
            return trial.suggest_int(name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(name, self.low, self.high, log=self.log, step=self.step)

    def holds(self, value: object) -> bool:
        """Say whether `value` is one of the dimension's."""
        if self.kind == "choice":
            return any(value == c and type(value) is type(c) for c in self.choices)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return self.low <= value <= self.high and (self.kind == "float" or value == int(value))

    def corners(self) -> tuple[Value, ...]:
        """Return values that stand for all: both ends, or every choice."""
        if self.kind == "choice":
            return self.choices
        ends = (self.low, self.high)
        return tuple(int(end) for end in ends) if self.kind == "int" else ends


def parse(text: object) -> Dimension:
    """Return the dimension that a recipe's text, or a plain list of choices, describes.

    Nothing is evaluated: numbers, true, false, null and plain words are all there is.

    Raises:
        RecipeError: it is none of FORMS, or its numbers do not go together.
    """
    if isinstance(text, Sequence) and not isinstance(text, str):
        return _choice(list(text))
    found = _CALL.match(text) if isinstance(text, str) else None
    if found is None:
        raise RecipeError(f"{text!r} but one of {', '.join(FORMS)} is expected.")
    name = found[1]
    values = [_value(word) for word in found[2].split(",")] if found[2].strip() else []
    if name == "choice":
        return _choice(values)
    return _numbers(name, values)


def _value(word: str) -> Value:
    word = word.strip().strip("'\"")
    if word.lower() in _CONSTANTS:
        return _CONSTANTS[word.lower()]
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    if not _WORD.match(word):
        raise RecipeError(f"{word!r} but a number, true, false, null or a plain word is expected.")
    return word


def _choice(values: list[Any]) -> Dimension:
    plain = all(v is None or isinstance(v, bool | int | float | str) for v in values)
    if not values or not plain or len({repr(v) for v in values}) < len(values):
        raise RecipeError("choice: at least one plain value is expected, each of them once.")
    return Dimension("choice", choices=tuple(values))


def _numbers(name: str, values: list[Value]) -> Dimension:
    expected = {"uniform": 2, "quniform": 3, "loguniform": 2, "int": 2, "logint": 2}
    if name not in expected:
        raise RecipeError(f"{name!r} but one of {', '.join(FORMS)} is expected.")
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if not (len(numbers) == len(values) == expected[name]) or not all(map(math.isfinite, numbers)):
        raise RecipeError(f"{name}: {expected[name]} finite numbers are expected.")
    low, high = numbers[:2]
    whole, log = name in ("int", "logint"), name in ("loguniform", "logint")
    if not low < high or (log and low <= 0):
        least = "0 < low < high" if log else "low < high"
        raise RecipeError(f"{name}: {low:g} and {high:g} but {least} is expected.")
    if whole and (low != int(low) or high != int(high)):
        raise RecipeError(f"{name}: {low:g} and {high:g} but whole numbers are expected.")
    step = numbers[2] if name == "quniform" else None
    if step is not None and not 0 < step <= high - low:
        raise RecipeError(f"{name}: step {step:g} but one within the range is expected.")
    return Dimension("int" if whole else "float", low, high, log, step)
