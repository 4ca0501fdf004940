"""What becomes of a table's rows when tasks are evicted: they go on with those that are left."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from icm_ray.config import FinetuneRecipe, MethodRow, PipelineRecipe
from icm_ray.methods import METHODS
from icm_ray.methods.table import is_role
from icm_ray.suites import find_suite
from icm_ray.workflows.evicting import Evicted, others
from icm_ray.workflows.pipeline.adapters import ready_set
from icm_ray.workflows.pipeline.table import Gone

WEIGHTS = "weights"


def gone(recipe: FinetuneRecipe, evicted: Evicted) -> Gone:
    """Return what a recipe, as it was written, lost."""
    rows = recipe.methods or [] if isinstance(recipe, PipelineRecipe) else []
    order = _order(recipe) if evicted and rows else []
    merges = {row.name: {*_merged(row, order)} & {*evicted} for row in rows}
    lines = [line for row in rows for line in _lines(row, order, evicted)] if evicted else []
    return Gone(evicted, merges, lines)


def without_tasks(recipe: FinetuneRecipe, names: Collection[str]) -> FinetuneRecipe | None:
    """Return a recipe without some tasks and their adapters; None if none or all of it is theirs.

    Rows merge, weigh and search the others. A row with none is left out, and so is one of which a
    parameter names what is gone.
    """
    suite = find_suite(recipe.suite)
    tasks = list(recipe.tasks or suite.tasks)
    changes: dict[str, Any] = {"tasks": [task for task in tasks if task not in names]}
    if not changes["tasks"] or len(changes["tasks"]) == len(tasks):
        return None
    if isinstance(recipe, PipelineRecipe):
        meets = suite.experts_of([ref.name for ref in recipe.adapters])
        theirs = {meets[task] for task in names if task in meets}
        changes["adapters"] = others(recipe.adapters, theirs)
        order = _order(recipe) if recipe.methods else []
        kept = [row for row in recipe.methods or [] if not _loses_all(row, order, names)]
        if recipe.methods and not kept:
            return None
        changes["methods"] = recipe.methods and [_without(row, order, names) for row in kept]
        if recipe.adapters and not changes["adapters"]:
            return None
    return recipe.model_copy(update=changes)


def _order(recipe: FinetuneRecipe) -> list[str]:
    """Return the names that rows merge, in the order of lists of weights."""
    if isinstance(recipe, PipelineRecipe) and recipe.adapters:
        one = ready_set(recipe)
        return [*one.experts, *one.unproven]
    return list(recipe.tasks or find_suite(recipe.suite).tasks)


def _merged(row: MethodRow, order: Sequence[str]) -> list[str]:
    return [name for name in order if row.tasks is None or name in row.tasks]


def _loses_all(row: MethodRow, order: Sequence[str], names: Collection[str]) -> bool:
    return {*_merged(row, order)} <= {*names} or any(_roles(row, names))


def _without(row: MethodRow, order: Sequence[str], names: Collection[str]) -> MethodRow:
    params, weights = dict(row.params), row.params.get(WEIGHTS)
    if isinstance(weights, Mapping):
        params[WEIGHTS] = {name: one for name, one in weights.items() if name not in names}
    elif isinstance(weights, list):
        pairs = zip(_merged(row, order), weights, strict=True)  # as many, or it was refused
        params[WEIGHTS] = [one for name, one in pairs if name not in names]
    searched = {f"{WEIGHTS}.{name}" for name in names}
    return row.model_copy(
        update={
            "tasks": row.tasks and [task for task in row.tasks if task not in names],
            "params": params,
            "search": {key: one for key, one in row.search.items() if key not in searched},
        }
    )


def _roles(row: MethodRow, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the parameters of a row that name one of some adapters, each with the name."""
    if row.method not in METHODS:
        return
    for key, parameter in METHODS[row.method].parameters().items():
        value = row.params.get(key, parameter.default)
        if is_role(parameter) and value in names:
            yield key, value


def _lines(row: MethodRow, order: Sequence[str], names: Collection[str]) -> Iterator[str]:
    """Yield what is said of one row."""
    for key, name in _roles(row, names):
        yield f"methods.{row.name}: left out, since its {key} was {name}."
        return
    if _loses_all(row, order, names):
        yield f"methods.{row.name}: left out, since none of its tasks is left."
        return
    weighed = {*_merged(row, order)} & {*names} if row.params.get(WEIGHTS) else set()
    weighed |= {name for name in names if f"{WEIGHTS}.{name}" in row.search}
    if weighed:
        yield f"methods.{row.name}: goes on without the weight of {', '.join(sorted(weighed))}."
