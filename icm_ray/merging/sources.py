"""What a merge recipe reads: its adapters, and every folder that must stay as it is."""

from pathlib import Path

from icm_ray.adapters import AdapterFile, open_all, unpickled
from icm_ray.config import MergeRecipe
from icm_ray.errors import InputError
from icm_ray.merging.whole_layers import check_mean
from icm_ray.suites import default_cache

Refs = list[tuple[str, Path]]


def open_inputs(recipe: MergeRecipe, *, hashed: bool = True) -> list[AdapterFile]:
    """Open a recipe's adapters as its policies say; see `open_all`.

    Raises:
        InputError: with every problem of every adapter, and of averaging their full layers.
    """
    refs = [ref.pair for ref in recipe.adapters]
    if recipe.allow_pickle:
        refs = _unpickled(refs, Path(recipe.cache) if recipe.cache else default_cache())
    files = open_all(
        refs,
        recipe.modules_to_save,
        base=recipe.base,
        same_base=recipe.same_base,
        run_by="gathering evidence" if recipe.data else "",
        hashed=hashed,
    )
    if recipe.modules_to_save == "mean":
        check_mean(files)
    return files


def sources_of(recipe: MergeRecipe) -> dict[str, Path]:
    """Return the folders that a recipe reads, by what they are."""
    paths = {f"adapter {ref.name!r}": ref.path for ref in recipe.adapters}
    paths |= {"evidence": recipe.evidence} if recipe.evidence else {}
    paths |= {"base": recipe.base} if recipe.base and Path(recipe.base).is_dir() else {}
    return {what: Path(path) for what, path in paths.items()}


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
