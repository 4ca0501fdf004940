"""An imported recipe: checked against the method it names, and written with its comments."""

import re
import textwrap
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icm_ray.config import MergeRecipe
from icm_ray.errors import RecipeError, one_line
from icm_ray.methods import METHODS, find_method

WIDTH = 98
FILL_IN = "FILL_IN/"
"""Start of a path that the source does not tell."""


@dataclass(frozen=True)
class Imported:
    """Another tool's recipe in our words.

    Attributes:
        source: The file it came from.
        tool: What the file is, in words.
        adapters: Path by name, in the order of the source.
        method: A name in METHODS.
        params: Its parameters.
        output: Where the merged adapter will go.
        rank: Rank of the result; None for the method's default.
        dtype: Element type of the result; None for that of the inputs.
        base: The base model, if the source names it; merging does not need it.
        differences: How this merge differs from the other tool's, one paragraph each.
        warnings: What was left out, and what is left to do; one line each.
    """

    source: Path
    tool: str
    adapters: Mapping[str, str]
    method: str
    params: Mapping[str, Any]
    output: str
    rank: int | None = None
    dtype: str | None = None
    base: str | None = None
    differences: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def recipe(self) -> dict[str, Any]:
        """Return the merge recipe as plain data."""
        cut = {"rank": self.rank, "dtype": self.dtype}
        return {
            "adapters": [{"name": name, "path": path} for name, path in self.adapters.items()],
            "method": self.method,
            "params": dict(self.params),
            "output": {"path": self.output, **{k: v for k, v in cut.items() if v is not None}},
        }


def checked(imported: Imported) -> Imported:
    """Return `imported` if its method exists and takes its parameters; RecipeError otherwise."""
    problems: list[str] = []
    try:
        if imported.method in METHODS:
            find_method(imported.method).bind(imported.params, list(imported.adapters))
        else:
            problems.append(f"its method is {imported.method!r} here, which this version lacks.")
        MergeRecipe.model_validate(imported.recipe())
    except RecipeError as error:
        problems += error.problems
    except ValueError as error:  # a name or path no recipe may hold
        problems += [line.strip() for line in str(error).splitlines()[1:3]]
    problems += [
        f"adapters: {name}: a path may not hold '${{'. Rename the folder."
        for name, path in imported.adapters.items()
        if "${" in path
    ]
    if problems:
        raise RecipeError([f"{imported.source}: {problem}" for problem in problems])
    return imported


def recipe_text(imported: Imported) -> str:
    """Return the recipe as YAML, its differences from the other tool's merge as comments."""
    import yaml

    lines = [f"Imported from {one_line(imported.source.name)}, {imported.tool}.", ""]
    lines += ["    icm-ray plan -c THIS_FILE", "    icm-ray merge -c THIS_FILE", ""]
    for difference in imported.differences:
        lines += textwrap.wrap(
            one_line(difference), WIDTH - 4, initial_indent="- ", subsequent_indent="  "
        )
    comments = "".join(f"# {line}".rstrip() + "\n" for line in lines)
    if imported.base:
        comments += "#\n# Not needed to merge; if set, the forward pass is checked on it as well:\n"
        comments += f"# base: {one_line(imported.base)}\n"
    body = yaml.safe_dump(
        imported.recipe(),
        sort_keys=False,
        default_flow_style=None,
        width=WIDTH,
        # A right-to-left override in a path must not rewrite what a terminal shows.
        allow_unicode="".join(imported.adapters.values()).isprintable(),
    )
    return comments + body


def write_recipe(imported: Imported, target: Path, *, overwrite: bool = False) -> None:
    """Write the recipe to a file; one that exists is replaced only if `overwrite` says so."""
    try:
        with target.open("w" if overwrite else "x", encoding="utf-8") as file:
            file.write(recipe_text(imported))
    except FileExistsError:
        raise RecipeError(f"{target}: exists. Choose another name, or say --overwrite.") from None
    except OSError as error:
        raise RecipeError(f"{target}: cannot be written ({error.strerror}).") from None


def adapter_names(texts: Collection[str]) -> list[str]:
    """Return a recipe name for each text: the last part of a path, made unique by a number."""
    names: dict[str, None] = {}
    numbers: Counter[str] = Counter()
    for text in texts:
        last = text.rstrip("/\\").replace("\\", "/").rpartition("/")[2]
        plain = re.sub(r"[^A-Za-z0-9_.-]+", "-", last).strip("-._")[:90] or "adapter"
        name = plain
        while name in names:
            numbers[plain] += 1
            name = f"{plain}-{numbers[plain] + 1}"
        names[name] = None
    return list(names)


def to_download(adapters: Mapping[str, str]) -> list[str]:
    """Return a line for each path that is no folder here, saying how to get it."""
    names = []
    for name, path in adapters.items():
        if path.startswith(FILL_IN):
            names.append(f"adapters: {name}: the file does not say its path. Fill it in.")
        elif not Path(path).is_dir():
            names.append(
                f"adapters: {name}: no folder {path} here. If that is a hub repository: "
                f"hf download {path} --local-dir FOLDER, and write the folder."
            )
    return names
