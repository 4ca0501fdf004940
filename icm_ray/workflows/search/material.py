"""What all trials of a search share, gathered once: evidence, inputs, heads, references."""

import math
from collections.abc import Mapping
from pathlib import Path

from icm_ray.distributed.evidence import checkpoints_on_ray, grams_on_ray
from icm_ray.distributed.scores import Standings, references, score_on_ray
from icm_ray.distributed.session import Pool
from icm_ray.errors import InputError
from icm_ray.evaluation.metrics import share
from icm_ray.evaluation.scoring import TaskScore, task_data
from icm_ray.evidence.tensors import read_evidence
from icm_ray.learning.tasks import LearnerData, learner_data
from icm_ray.search.measuring import Material
from icm_ray.search.plan import Plan


def check_experts(scores: Mapping[str, TaskScore]) -> None:
    """Raise InputError with a line for each expert by whose score no merge can be measured."""
    lines = [
        f"experts: {task}: {one.score.metric} is {one.score.value:g} on {len(one.predictions)} "
        "validation examples, so no merge can be measured by it. Give more examples, leave the "
        "task out, or search with an objective that reads no labels."
        for task, one in scores.items()
        if math.isnan(share(one.score.value, one.score.value, one.score.metric))
    ]
    if lines:
        raise InputError(lines)


def gather_material(plan: Plan, pool: Pool, target: Path) -> Material:
    """Gather what all trials share: evidence, inputs, heads, and the references' predictions."""
    recipe, files = plan.recipe, plan.files
    data = LearnerData({})
    if plan.needs_inputs:
        assert recipe.data is not None, "checked with the plan"
        tasks = [file.name for file in files]
        data = learner_data(recipe.data, tasks, plan.objectives, plan.experts)
    grams, scored, predictions, checkpoints = None, {}, {}, None
    if plan.needs_grams:
        folder = target.with_name(f"{target.name}.grams")
        grams = read_evidence(grams_on_ray(pool, files, data.inputs, folder))
    if plan.needs_scores:
        limit = plan.suite.limit(recipe.validation, recipe.most)
        scored = task_data(plan.suite, plan.experts, "validation", limit)
        scores = score_on_ray(pool, references(plan.proven), scored, target / "scores")
        known = Standings.among(scores)
        check_experts(known.expert)
        predictions = {
            "base": {task: one.predictions for task, one in known.base.items()},
            "expert": {task: one.predictions for task, one in known.expert.items()},
        }
    if plan.needs_fusion:
        checkpoints = checkpoints_on_ray(pool, files, data.inputs, plan.trajectories)
    return Material(
        adapters=[file.load() for file in files],
        data=data,
        grams=grams,
        scored=scored,
        references=predictions,
        seed=recipe.seed,
        threads=recipe.resources.threads,
        checkpoints=checkpoints,
    )
