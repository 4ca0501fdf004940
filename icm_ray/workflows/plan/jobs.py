"""What each job will do, counted from its recipe and timed by `measured.Bench`.

A plan opens adapters and data as the job does, so it refuses what the job would refuse. It writes
nothing but a base that was not prepared yet.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from icm_ray.config import (
    EvaluateRecipe,
    EvidenceRecipe,
    FinetuneRecipe,
    LearnRecipe,
    PipelineRecipe,
    Recipe,
    SearchRecipe,
    TrainFusionRecipe,
)
from icm_ray.distributed.evidence import EVIDENCE_BATCH
from icm_ray.learning.recipes import needs_grams
from icm_ray.learning.tasks import LearnerData, load_inputs
from icm_ray.merging.estimate import warnings_of
from icm_ray.workflows.evaluate import wanted
from icm_ray.workflows.evidence import adapters_of
from icm_ray.workflows.learn import request_of
from icm_ray.workflows.pipeline.offer import REFERENCES_COST
from icm_ray.workflows.plan.experts import plan_experts
from icm_ray.workflows.plan.fusion import plan_fusion
from icm_ray.workflows.plan.measured import FEW, Bench, peak_bytes
from icm_ray.workflows.plan.pipeline import asked_of, planned_rows
from icm_ray.workflows.plan.planned import LOOKS, JobPlan, count, grams_of, workers_here
from icm_ray.workflows.plan.search import plan_search
from icm_ray.workflows.prepared import data_of, heads_in, prepared_base

RAY_SECONDS = 10.0
"""A local Ray's start and end."""


def _evidence(recipe: EvidenceRecipe) -> tuple[Bench, JobPlan]:
    files = adapters_of(recipe)
    data = LearnerData(load_inputs(recipe.data, [file.name for file in files]))
    base = prepared_base(recipe, data_of(recipe.data), splits=[recipe.data.split])
    bench = Bench(base, recipe.resources)
    if recipe.kind == "gram_statistics":
        one = bench.grams(files, data, recipe.batch) * (1 + recipe.again)
        gathered, warnings = grams_of(recipe, files)
    else:
        one = 2 * bench.forward(data, recipe.batch)  # the base's own states beside the adapter's
        gathered, warnings = 0, warnings_of(files)
    seconds = {recipe.kind.replace("_", " "): one * count(data)}
    return bench, JobPlan(seconds, len(files), gathered=gathered, warnings=tuple(warnings))


def _learn(recipe: LearnRecipe) -> tuple[Bench, JobPlan]:
    request = request_of(recipe)
    files = request.files
    suite, heads = data_of(recipe.data), heads_in(request.data)
    bench = Bench(prepared_base(recipe, suite, heads, [recipe.data.split]), recipe.resources)
    spec, data = request.spec, request.data
    how, examples = spec.optimisation, count(data)
    one = bench.forward(data, how.batch)
    seconds, gathered, warnings = {}, 0, warnings_of(files)
    if needs_grams(spec):
        seconds["gram statistics"] = bench.grams(files, data, EVIDENCE_BATCH) * examples
        gathered, warnings = grams_of(recipe, files)
    seconds["losses before and after"] = LOOKS * one * examples
    step = bench.step(spec, [file.load() for file in files], data)
    seconds[f"{how.steps} steps"] = how.steps * how.batch * len(files) * step
    return bench, JobPlan(seconds, len(files), gathered=gathered, warnings=tuple(warnings))


def _evaluate(recipe: EvaluateRecipe) -> tuple[Bench, JobPlan]:
    asked = wanted(recipe)
    bench = Bench(asked.base, recipe.resources)
    few = {task: replace(one, examples=one.examples.first(FEW)) for task, one in asked.data.items()}
    one = bench.scored(few, recipe.batch)
    examples = sum(len(item.examples) for item in asked.data.values())
    seconds = {"base and experts": 2 * one * examples}
    seconds |= {item.label: one * examples for item in asked.items}
    if asked.realign:
        fitted = sum(len(item.examples) for item in asked.realign.values())
        again = (examples + fitted) * (len(asked.items) + 1) + fitted
        seconds["re-aligned heads"] = one * again
    return bench, JobPlan(seconds, len(asked.everything))


def _pipeline(recipe: PipelineRecipe) -> tuple[Bench, JobPlan]:
    asked = asked_of(recipe)
    bench = Bench(asked.base, recipe.resources)
    tasks = len(asked.suite.tasks)
    workers = workers_here(recipe.resources, tasks)
    found = planned_rows(asked, bench, workers)
    of_rows = {REFERENCES_COST: found["scoring"][REFERENCES_COST], **dict(found["seconds"])}
    seconds = {name: asked.sets * workers * spent for name, spent in of_rows.items()}
    return bench, JobPlan(seconds, tasks, left_out=found["left_out"])


_PLANS: Mapping[type[Recipe], Callable[[Any], tuple[Bench, JobPlan]]] = {
    EvidenceRecipe: _evidence,
    LearnRecipe: _learn,
    EvaluateRecipe: _evaluate,
    PipelineRecipe: _pipeline,
    FinetuneRecipe: plan_experts,
    TrainFusionRecipe: plan_fusion,
    SearchRecipe: plan_search,
}


def plan(recipe: Recipe) -> dict[str, Any]:
    """Return what a job will do and need; `summary` is for people.

    Time and memory come from a few of the recipe's own inputs, run here through the base.

    Raises:
        InputError, RecipeError: as the job itself would before any work.
    """
    bench, plan = _PLANS[type(recipe)](recipe)
    workers = workers_here(recipe.resources, plan.items)
    whole = sum(plan.seconds.values())
    base = bench.session.shared
    own = peak_bytes() - bench.mapped
    time = bench.start_seconds + plan.starts + whole / workers + RAY_SECONDS
    summary = {
        "base": f"{base.path.name}, {base.bytes / 1e6:.0f} MB in {base.dtype}, "
        f"loaded in {bench.start_seconds:.1f} s",
        "workers here": f"{workers}",
        **{stage: f"{seconds:.1f} s of one worker" for stage, seconds in plan.seconds.items()},
        "time": f"about {time:.0f} s with these workers, starting them and Ray included",
        "memory a worker": f"{own / 1e6:.0f} MB, and {bench.mapped / 1e6:.0f} MB of base and "
        "libraries that the workers of a node share",
        "memory of the driver": f"{bench.bare / 1e6:.0f} MB",
    }
    if bench.device_bytes:
        summary["memory a device"] = f"{bench.device_bytes / 1e6:.0f} MB"
    if plan.gathered:
        summary["disk"] = f"{plan.gathered / 1e6:.0f} MB, twice that while it is put together"
    elif plan.written:
        summary["disk"] = f"{plan.written / 1e6:.0f} MB"
    return {
        "summary": summary,
        "warnings": [
            *plan.warnings,
            *(f"left out: {n}: {why}" for n, why in plan.left_out.items()),
        ],
        **asdict(plan),
        "workers": workers,
        "total_seconds": time,
        "worker_bytes": own,
        "shared_bytes": bench.mapped,
        "driver_bytes": bench.bare,
        "device_bytes": bench.device_bytes,
    }
