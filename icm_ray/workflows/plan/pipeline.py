"""What a pipeline's table will try, and what the budget leaves out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icm_ray.config import PipelineRecipe
from icm_ray.distributed.speed import Speed
from icm_ray.errors import RecipeError
from icm_ray.evaluation.experts import find_experts
from icm_ray.evaluation.scoring import BATCH
from icm_ray.suites import Suite, find_suite
from icm_ray.workflows.pipeline.adapters import check_ready, ready_set, settled
from icm_ray.workflows.pipeline.offer import few_inputs, few_of, planned
from icm_ray.workflows.pipeline.stages import check_rows
from icm_ray.workflows.pipeline.table import SetResults, Table
from icm_ray.workflows.plan.measured import Bench


@dataclass(frozen=True)
class Asked:
    """A pipeline over adapters that are there, checked before any spend.

    Attributes:
        recipe: The recipe, with its base and sizes.
        suite: Its suite.
        one: The adapters by task, of the first set where there are several.
        sets: How many sets there are.
        base: The base's folder.
    """

    recipe: PipelineRecipe
    suite: Suite
    one: SetResults
    sets: int
    base: Path


def asked_of(recipe: PipelineRecipe) -> Asked:
    """Open what a recipe names.

    Raises:
        RecipeError: experts would be trained first, so nothing is known of them; or as the job.
    """
    check_rows(recipe)
    suite, sets = find_suite(recipe.suite), 1
    if recipe.adapters:
        check_ready(recipe)
        one = ready_set(recipe)
    elif recipe.experts:
        label, sets = recipe.sets[0].label, len(recipe.sets)
        one = SetResults(label, find_experts(Path(recipe.experts) / label))
    else:
        raise RecipeError(
            "adapters: none are named, so experts are trained first, and a plan is made of ready "
            "ones. Name some, or run the job; stopped and started again, it goes on."
        )
    sized, base = settled(recipe, suite, one)
    assert isinstance(sized, PipelineRecipe)
    return Asked(sized, suite, one, sets, base)


def planned_rows(asked: Asked, bench: Bench, workers: int) -> dict[str, Any]:
    """Return what `offer.planned` says of the table on some workers."""
    recipe, one = asked.recipe, asked.one
    table = Table(recipe, asked.suite, asked.base, bench.session, [one])
    budget = recipe.budget.seconds(workers, recipe.resources) if recipe.budget else None
    return planned(table, one, _speed(table, one, bench), budget, workers)


def _speed(table: Table, one: SetResults, bench: Bench) -> Speed:
    """Return what `distributed.speed.speed_of` would measure on workers."""
    few, inputs = few_of(table, one), few_inputs(table, one)
    own = [file.load() for file in one.proven()]
    experts = [bench.scored({a.name: few[a.name]}, BATCH, a) for a in own]
    return Speed(bench.forward(inputs, BATCH), bench.scored(few, BATCH), sum(experts) / len(own))
