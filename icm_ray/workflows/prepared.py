"""What jobs settle before anything is spent: the base, how much of the data, and what they lack."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from icm_ray.adapters import AdapterFile
from icm_ray.base_model.loading import load_reader
from icm_ray.base_model.readers import TextReader
from icm_ray.config import USUAL_SIZES, FinetuneRecipe, Recipe, Sizes
from icm_ray.errors import InputError, RecipeError
from icm_ray.evaluation.adapter_heads import check_heads
from icm_ray.evaluation.experts import Expert, heads_of
from icm_ray.merging.estimate import warn
from icm_ray.suites import Suite, prepare_base

R = TypeVar("R", bound=Recipe)


def with_base(recipe: R, suite: Suite, files: Sequence[AdapterFile] = ()) -> R:
    """Return a recipe that names its base: its own word, else the suite's, else the adapters'.

    Raises:
        RecipeError: nobody names one.
    """
    said = getattr(recipe, "base", None)
    if said is not None:
        return recipe
    names = sorted({file.base_model for file in files if file.base_model})
    base = suite.base or (names[0] if len(names) == 1 else None)
    if base is None:
        found = f"the adapters name {', '.join(names)}" if names else "nobody names one"
        raise RecipeError(f"base: {found} but one is expected. Set base: here or in suite.yaml.")
    revision = getattr(recipe, "revision", None) or suite.revision
    return recipe.model_copy(update={"base": base, "revision": revision})


def with_sizes(recipe: FinetuneRecipe, suite: Suite) -> FinetuneRecipe:
    """Return a recipe that says how many examples of each split are used; None: all.

    Raises:
        InputError: a split of a task holds fewer than it asks for, or none.
    """
    asked = recipe.sizes
    sizes = {name: suite.limit(getattr(asked, name), usual) for name, usual in USUAL_SIZES.items()}
    check_counts(suite, recipe.tasks or suite.tasks, {**sizes, "validation": _most(sizes, asked)})
    return recipe.model_copy(update={"sizes": Sizes(**{**asked.model_dump(), **sizes})})


def _most(sizes: Mapping[str, int | None], asked: Sizes) -> int | None:
    both = [size for size in (sizes["validation"], asked.tuning) if size is not None]
    return max(both, default=None)


def check_counts(suite: Suite, tasks: Iterable[str], sizes: Mapping[str, int | None]) -> None:
    """Raise InputError for every split of a task that holds fewer examples than are used."""
    lines = [
        f"suite {suite.name!r}: {task}/{split}: {size or 'some'} examples are wanted but {count} "
        "are there. Ask for fewer, or give more rows."
        for task in tasks
        for split, size in sizes.items()
        if (count := suite.count(task, split)) < (size or 1)
    ]
    if lines:
        raise InputError(lines)


def preparing(recipe: Recipe) -> Callable[..., Path]:
    """Return what makes the folder of a recipe's base, on this node or on one that lacks it."""
    name, revision = getattr(recipe, "base", None), getattr(recipe, "revision", None)
    return partial(prepare_base, str(name), recipe.cache, revision)


def prepared_base(recipe: Recipe, suite: Suite | None, experts: Mapping[str, Expert]) -> Path:
    """Return the folder of a recipe's base, fetched if need be, after a look at how it reads.

    Says how many rows lose tokens, and refuses heads that the base's classifiers would not read
    as they are read here.

    Raises:
        InputError: a head, a chat template or a row does not go with the base.
    """
    base = preparing(recipe)(progress=print)
    if suite is not None and not suite.is_packaged:
        suite, heads = heads_of(suite, experts)
        check_heads(heads, base)
        warn(cut_lines(suite, base))
    return base


def cut_lines(suite: Suite, base: Path) -> list[str]:
    """Return a line for each task with rows longer than the base reads or the suite allows.

    Raises:
        InputError: rows that the base's tokenizer or chat template refuses.
    """
    reader, lines, problems = load_reader(base), [], []
    if not isinstance(reader, TextReader):
        return []
    for name, task in suite.tasks.items():
        cut = total = 0
        for split in ("train", "calibration", "validation", "test"):
            if not suite.count(name, split):
                continue
            examples = suite.load(name, split)
            try:
                cut += len(reader.overlong(examples.inputs, task.max_tokens))
            except InputError as error:
                problems += [f"suite {suite.name!r}: {name}/{split}: {p}" for p in error.problems]
            total += len(examples)
        if cut:
            most = min(task.max_tokens, reader.longest)
            lines.append(f"{name}: {cut} of {total} rows are longer than {most} tokens and cut.")
    if problems:
        raise InputError(problems)
    return lines
