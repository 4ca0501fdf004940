"""Ready adapters in the place of experts that would be trained: which of them meet which tasks."""

from dataclasses import replace
from pathlib import Path

from icm_ray.adapters import check_base
from icm_ray.config import FinetuneRecipe, PipelineRecipe
from icm_ray.errors import RecipeError
from icm_ray.evaluation.experts import heads_of, ready_experts
from icm_ray.learning.tasks import headless
from icm_ray.merging.estimate import unproven_lines, warn, warnings_of
from icm_ray.merging.requirements import needs_of
from icm_ray.methods import METHODS
from icm_ray.suites import SPLITS, Suite, find_suite
from icm_ray.suites.tasks import FIDELITY
from icm_ray.workflows.pipeline.table import SetResults
from icm_ray.workflows.prepared import prepared_base, with_base, with_sizes

READY = "adapters"
"""Label of the set that ready adapters are."""
OF_TRAINING = ("lora", "training", "sets", "experts", "dtype", "tune")


def ready_set(recipe: PipelineRecipe) -> SetResults:
    """Return a recipe's adapters by task, and say which of them no task proves."""
    suite = find_suite(recipe.suite)
    tasks = list(recipe.tasks or suite.tasks)
    given = ready_experts(ref.pair for ref in recipe.adapters)
    meets = {t: name for t, name in suite.experts_of(given).items() if t in tasks}
    experts = {task: replace(given[name], task=task) for task, name in meets.items()}
    rest = given.keys() - {*meets.values()}
    unproven = {name: one.adapter for name, one in given.items() if name in rest}
    without = [task for task in tasks if task not in meets]
    known = {task: suite.tasks[task] for task in without}
    unseen = [t for t, one in known.items() if not one.headed and one.metric != FIDELITY]
    return SetResults(READY, experts, unproven, unseen, recipe.modules_to_save)


def check_ready(recipe: PipelineRecipe) -> None:
    """Open a recipe's adapters, and say what is odd about them and what will not be proven.

    Raises:
        InputError: an adapter is broken, or does not fit the others.
        RecipeError: no adapter has a task, or one lacks its head.
    """
    one, suite = ready_set(recipe), find_suite(recipe.suite)
    if problems := headless(suite, one.experts):
        raise RecipeError(problems)
    warn([*warnings_of(one.files()), *unproven_lines(one.unproven)])
    tasks = recipe.tasks or suite.tasks
    if silent := sorted(set(tasks) - set(one.scored)):
        warn([f"{', '.join(silent)}: no adapter, so no head or nothing to compare. Left out."])
    if one.unseen:
        warn([f"{', '.join(one.unseen)}: no adapter; scored beside the base as unseen."])


def settled(
    recipe: FinetuneRecipe, suite: Suite, one: SetResults | None
) -> tuple[FinetuneRecipe, Path]:
    """Return a recipe that says its base and all sizes, and the base's folder.

    Args:
        recipe: The recipe.
        suite: Its suite.
        one: Adapters that are there; None: they are trained.

    Raises:
        RecipeError: nobody names a base.
        InputError: a split holds too few rows, or heads, rows or adapters do not go with the base.
    """
    files = one.files() if one else ()
    recipe = with_sizes(with_base(recipe, suite, files), suite)
    heads = heads_of(suite, one.experts)[1] if one else {}
    base = prepared_base(recipe, suite, heads, SPLITS[1:] if one else SPLITS)
    check_base(files, base)
    return recipe, base


def adapter_problems(recipe: PipelineRecipe, one: SetResults) -> list[str]:
    """Return what in a recipe does not go with ready adapters, one line each.

    Args:
        recipe: The recipe.
        one: Its adapters by task.
    """
    problems = [
        f"{key}: would train or find experts, but adapters are ready. Leave one of them out."
        for key in OF_TRAINING
        if key in recipe.model_fields_set
    ]
    names = [ref.name for ref in recipe.adapters]
    twice = sorted(name for name in set(names) if names.count(name) > 1)
    problems += [f"adapters: {name!r} twice. Name each once." for name in twice]
    if not one.experts:
        known = ", ".join(recipe.tasks or find_suite(recipe.suite).tasks)
        problems.append(
            f"adapters: {', '.join(names)}: none is called as a task ({known}). Name each by its "
            "task."
        )
    for row in recipe.methods or []:
        blind = [name for name in one.unproven if row.tasks is None or name in row.tasks]
        if blind and row.method in METHODS and needs_of(row.method, row.metric):
            problems.append(
                f"methods.{row.name}: needs inputs of every adapter, and {', '.join(blind)} has no "
                "task. Leave the adapter out with tasks: or choose a method without data."
            )
    return problems
