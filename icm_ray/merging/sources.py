"""Where a merge recipe's adapters come from."""

from pathlib import Path

from icm_ray.adapters import AdapterFile, open_all, unpickled
from icm_ray.config import MergeRecipe
from icm_ray.errors import InputError
from icm_ray.suites import default_cache

Refs = list[tuple[str, Path]]


def open_adapters(recipe: MergeRecipe) -> list[AdapterFile]:
    """Open a recipe's adapters, reporting the problems of all of them at once.

    Raises:
        InputError: with every problem of every adapter.
    """
    refs: Refs = [(ref.name, Path(ref.path)) for ref in recipe.adapters]
    if recipe.allow_pickle:
        refs = _unpickled(refs, Path(recipe.cache) if recipe.cache else default_cache())
    return open_all(refs, recipe.modules_to_save)


def _unpickled(refs: Refs, cache: Path) -> Refs:
    """Return what to read; a pickle that cannot be read does not hide another's problem."""
    converted: Refs = []
    problems: list[str] = []
    for name, path in refs:
        try:
            converted.append((name, unpickled(path, cache)))
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    return converted
