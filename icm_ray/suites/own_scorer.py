"""A scorer of one's own: a Python file beside suite.yaml, run only if a recipe allows it by name.

    # tasks.NAME.metric: judging:near       in suite.yaml
    # allow_code: true                      in the recipe

    # judging.py
    def near(said, wanted):
        return 1.0 if abs(float(said) - float(wanted)) < 0.1 else 0.0

It gets what a model said and what was right (texts, class names or numbers) and returns a number in
[0, 1], 1 for perfect. Nothing of the file is run before a model has answered.
"""

import ast
import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from icm_ray.config import ALLOW_CODE_VARIABLE
from icm_ray.errors import InputError, RecipeError, did_you_mean

NAME = re.compile(r"([A-Za-z_]\w*):([A-Za-z_]\w*)")
"""Of a metric that is such a scorer: file, without .py, and function."""
MAX_BYTES = 1_000_000
KINDS = ("classification", "multiple_choice", "regression", "generation")
"""What can be scored so."""


@contextlib.contextmanager
def allowing(code: bool) -> Iterator[None]:
    """Let what is code beside a suite run, if a recipe says so, while the body runs."""
    before = os.environ.get(ALLOW_CODE_VARIABLE)
    if code:
        os.environ[ALLOW_CODE_VARIABLE] = "1"
    try:
        yield
    finally:
        if code and before is None:
            del os.environ[ALLOW_CODE_VARIABLE]
        elif code and before is not None:
            os.environ[ALLOW_CODE_VARIABLE] = before


def is_allowed() -> bool:
    """Say whether somebody has allowed what is code beside a suite to run."""
    return os.environ.get(ALLOW_CODE_VARIABLE) == "1"


class OwnScorer(NamedTuple):
    """The text of a scorer, which travels to whoever scores, and is part of what scores are of.

    Attributes:
        name: file:function.
        code: The file's text.
    """

    name: str
    code: str

    def __call__(self, said: Any, wanted: Any) -> float:
        """Return the score of one answer.

        Raises:
            InputError: the function fails, or gives no number in [0, 1].
        """
        file = self.name.partition(":")[0]
        try:
            value = float(_function(self)(said, wanted))
        except Exception as error:  # of a stranger's function
            raise InputError(
                f"{file}.py: {self.name} fails on {str(said)[:60]!r} ({type(error).__name__}: "
                f"{error}). Correct it."
            ) from error
        if not 0 <= value <= 1 or math.isnan(value):
            raise InputError(
                f"{file}.py: {self.name} gives {value:g} for {str(said)[:60]!r} but a number in "
                "[0, 1] is expected. Correct it."
            )
        return value


def own_scorer(folder: Path, metric: str) -> OwnScorer | None:
    """Return the scorer that a metric names; None if it is a metric's name.

    Raises:
        RecipeError: nobody allowed code, or the file has no such function.
    """
    if (named := NAME.fullmatch(metric)) is None:
        return None
    path = folder / f"{named[1]}.py"
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise RecipeError(f"{metric!r} but there is no {path.name} of at most {MAX_BYTES} bytes.")
    try:
        code = path.read_text(encoding="utf-8")
        tree = ast.parse(code)
    except (ValueError, SyntaxError, RecursionError) as error:
        raise RecipeError(f"{path.name}: no Python ({error}). Correct it.") from None
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if named[2] not in functions:
        raise RecipeError(
            f"{metric!r} but {path.name} has {', '.join(functions) or 'no function'}."
            f"{did_you_mean(named[2], functions)}"
        )
    if not is_allowed():
        raise RecipeError(
            f"{metric!r} is Python of the suite and nobody has allowed to run it. Read "
            f"{path.name}; then set allow_code: true in the recipe."
        )
    return OwnScorer(metric, code)


@cache
def _function(scorer: OwnScorer) -> Callable[[Any, Any], Any]:
    file, function = scorer.name.split(":")
    space: dict[str, Any] = {"__name__": file}
    exec(compile(scorer.code, f"{file}.py", "exec"), space)
    return space[function]
