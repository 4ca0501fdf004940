"""`jobs.pipeline`: every missing stage, then the report and the best adapter."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from icm_ray.adapters import check_base
from icm_ray.config import FinetuneRecipe, PipelineRecipe
from icm_ray.distributed.session import opened
from icm_ray.evaluation.scoring import idle_lines
from icm_ray.finetuning.targets import with_targets
from icm_ray.merging.estimate import warn
from icm_ray.report import BASE, EXPERT, ReportData, summarise
from icm_ray.suites import Suite, find_suite
from icm_ray.workflows.evicting import evicting
from icm_ray.workflows.experts import start_of
from icm_ray.workflows.pipeline.adapters import check_ready, ready_set, settled
from icm_ray.workflows.pipeline.evicted import Gone, gone, without_tasks
from icm_ray.workflows.pipeline.report import console, publish, report_data
from icm_ray.workflows.pipeline.stages import check_rows, check_tasks, run_stages
from icm_ray.workflows.pipeline.table import DEFAULT, Table
from icm_ray.workflows.prepared import preparing


def run(recipe: PipelineRecipe, target: Path) -> dict[str, Any]:
    """Run every missing stage and write the report; a finished run only writes the report."""
    check_rows(recipe)
    if recipe.adapters:
        check_ready(recipe)
    return run_table(recipe, target)


def run_table(recipe: FinetuneRecipe, target: Path) -> dict[str, Any]:
    """Make a table of experts, and of merges if the recipe names some."""
    return evicting(
        recipe, without_tasks, lambda rest, evicted: _run(rest, target, gone(recipe, evicted))
    )


def _run(recipe: FinetuneRecipe, target: Path, without: Gone) -> dict[str, Any]:
    recipe, suite, base = settled_table(recipe)
    target.mkdir(parents=True, exist_ok=True)
    with opened(recipe.resources, base, recipe.seed, preparing(recipe)) as session:
        table = Table(recipe, suite, target, session, gone=without)
        run_stages(table)
    for one in table.sets:
        expert, base_alone = (one.scores[who, DEFAULT, "test"] for who in (EXPERT, BASE))
        warn(f"{one.label}: {line}" for line in idle_lines(expert, base_alone))
    data = report_data(table)
    outputs = publish(table, data)
    console(data)
    for name, where in outputs.items():
        print(f"{name}: {where}")
    warn(without.of_rows)
    chosen = {"choice": asdict(data.choice)} if data.choice else {}
    return {"outputs": outputs, "scores": _scores(data), **chosen}


def settled_table(recipe: FinetuneRecipe) -> tuple[FinetuneRecipe, Suite, Path]:
    """Return a recipe that leaves nothing open, its suite, and its base's folder, all checked.

    Raises:
        RecipeError, InputError: see `settled`; or a task or a target module is not there.
    """
    suite = find_suite(recipe.suite)
    check_tasks(recipe)
    one = ready_set(recipe) if isinstance(recipe, PipelineRecipe) and recipe.adapters else None
    recipe, base = settled(recipe, suite, one)
    if one is None:
        shared = recipe.training.tasks_per_forward > 1
        lora = with_targets(recipe.lora, base, shared=shared)
        recipe = recipe.model_copy(update={"lora": lora})
        if start := start_of(recipe):
            check_base([start], base)
    return recipe, suite, base


def _scores(data: ReportData) -> dict[str, Any]:
    """Return mean and worst normalised test score by expert set and row."""
    return {
        f"{row.expert_set}/{row.method}{' (tuned)' if row.tuned else ''}": {
            "mean": row.mean,
            "worst": row.worst,
        }
        for row in summarise(data.scores, "test").sets
    }
