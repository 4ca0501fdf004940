"""What a job does about a task whose workers die each time: it ends, or goes on without the task.

It goes on as the job of a recipe without the task: what is kept has that recipe's keys, and nothing
of it knows the task but what says so, cards and reports. Every run tries all tasks anew, since what
was broken may be mended.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, TypeVar

from icm_ray.config import AdapterRef, Recipe
from icm_ray.distributed.faults import LostWork
from icm_ray.merging.estimate import warn

R = TypeVar("R", bound=Recipe)
Evicted = Mapping[str, str]
"""By task or adapter that was left out: why."""


def evicting(
    recipe: R,
    without: Callable[[R, Collection[str]], R | None],
    run: Callable[[R, Evicted], dict[str, Any]],
) -> dict[str, Any]:
    """Run a job, and again without the tasks its workers die of, if its recipe says so.

    Args:
        recipe: The job's.
        without: Returns a recipe without what has one of some names; None if nothing has, or if
            nothing would be left.
        run: The job, given its recipe and what was left out before.

    Raises:
        LostWork: workers died each time, and the recipe refuses that or nobody knows of which task.
    """
    evicted: dict[str, str] = {}
    while True:
        try:
            found = run(recipe, evicted)
        except LostWork as error:
            evicts = recipe.resources.on_broken_task == "evict"
            rest = without(recipe, error.lost) if evicts else None
            if rest is None:
                raise
            recipe, evicted = rest, {**evicted, **error.lost}
            warn(evicted_lines(error.lost))
            continue
        if not evicted:
            return found
        warn(evicted_lines(evicted))
        return {**found, "evicted": evicted}


def evicted_lines(evicted: Evicted) -> list[str]:
    """Return a line about each task that was left out."""
    return [f"{name}: evicted, {why}. The others went on." for name, why in evicted.items()]


def others(refs: Collection[AdapterRef], names: Collection[str]) -> list[AdapterRef]:
    """Return the adapters of other names."""
    return [ref for ref in refs if ref.name not in names]


def without_adapters(recipe: R, names: Collection[str]) -> R | None:
    """Return a recipe of `adapters` without some; None if it has none of them, or no other."""
    given: list[AdapterRef] = getattr(recipe, "adapters")  # noqa: B009 - declared by the subclasses
    left = others(given, names)
    if len(left) in (0, len(given)):
        return None
    return recipe.model_copy(update={"adapters": left})
