"""`jobs.pipeline`: every missing stage, then the report and the best adapter."""

from pathlib import Path
from typing import Any

from icm_ray.config import PipelineRecipe
from icm_ray.distributed.cluster import connected
from icm_ray.errors import RecipeError
from icm_ray.suites import SUITES
from icm_ray.suites.bases import base_name, prepare_base
from icm_ray.workflows.pipeline.report import console, publish, report_data
from icm_ray.workflows.pipeline.stages import check_rows, run_pipeline


def pipeline_and_report(recipe: PipelineRecipe, target: Path) -> dict[str, Any]:
    """Run every missing stage and write the report; a finished run only writes the report."""
    if recipe.suite not in SUITES:
        raise RecipeError(f"suite: {recipe.suite!r} but one of {', '.join(SUITES)} is expected.")
    suite = SUITES[recipe.suite]
    check_rows(recipe)
    spec = recipe.base or suite.base
    path = prepare_base(spec, recipe.cache, recipe.revision, progress=print)
    target.mkdir(parents=True, exist_ok=True)
    with connected(recipe.resources):
        results = run_pipeline(recipe, path, base_name(spec), target)
    data = report_data(results, target)
    outputs = publish(results, data, target)
    console(data)
    for name, where in outputs.items():
        print(f"{name}: {where}")
    return {"outputs": outputs, "scores": data_scores(data)}


def data_scores(data: Any) -> dict[str, Any]:
    """Return mean and worst normalised test score by expert set and row."""
    from icm_ray.report import summarise

    return {
        f"{row.expert_set}/{row.method}{' (tuned)' if row.tuned else ''}": {
            "mean": row.mean,
            "worst": row.worst,
        }
        for row in summarise(data.scores, "test").sets
    }
