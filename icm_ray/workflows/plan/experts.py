"""What training experts will take: their probes, the steps of each group, and the scores of all."""

from collections.abc import Mapping
from pathlib import Path

import torch

from icm_ray.config import FinetuneRecipe
from icm_ray.distributed.speed import Speed
from icm_ray.evaluation.answers import head_features
from icm_ray.evaluation.experts import Expert
from icm_ray.evaluation.heads import Head
from icm_ray.evaluation.scoring import BATCH, TaskData
from icm_ray.finetuning.expert import Lesson
from icm_ray.suites import Examples, Suite
from icm_ray.workflows.experts import expert_jobs, start_of
from icm_ray.workflows.pipeline.offer import references_seconds
from icm_ray.workflows.pipeline.run import settled_table
from icm_ray.workflows.pipeline.table import SetResults, Table
from icm_ray.workflows.plan.measured import FEW, Bench
from icm_ray.workflows.plan.planned import JobPlan

NUMBER = 4
"""Bytes of one that is trained, of each of its two moments, and of one in a checkpoint."""


def plan_experts(recipe: FinetuneRecipe) -> tuple[Bench, JobPlan]:
    """Time a few steps of every group of experts, and the base on a few of their examples."""
    recipe, suite, base = settled_table(recipe)
    tasks, sets = recipe.tasks or list(suite.tasks), len(recipe.sets)
    most = recipe.training.train_examples
    train = {task: suite.load(task, "train").first(most) for task in tasks}
    bench = Bench(base, recipe.resources)
    label = recipe.sets[0].label
    jobs = {task: expert_jobs(recipe, suite)[label, task] for task in tasks}
    heads, probes = _heads(bench, suite, train)
    few = {
        task: TaskData(suite.tasks[task], suite.load(task, "validation", FEW), heads.get(task))
        for task in tasks
    }
    table = Table(recipe, suite, base, bench.session)
    one = SetResults(label, {task: Expert(task, Path(label, task)) for task in tasks})
    scored = bench.scored(few, BATCH)
    scores = references_seconds(table, one, Speed(scored, scored, scored))
    groups = dict.fromkeys(job.together for job in jobs.values())
    steps, numbers, start = 0.0, 0, start_of(recipe)
    for group in groups:
        lessons = [Lesson(jobs[task], train[task], heads.get(task), start) for task in group]
        trained = bench.training(lessons)
        steps += trained.start + recipe.training.steps * trained.step
        numbers += trained.numbers
    kept = min(recipe.training.checkpoints, recipe.training.steps)
    read = {split: getattr(recipe.sizes, split) for split in ("validation", "test")}
    seen = sum(
        len(train[task]) + sum(n or suite.count(task, split) for split, n in read.items())
        for task in heads
    )
    seconds = {
        "probes": probes * seen,
        f"{recipe.training.steps} steps of {sets * len(tasks)} experts": sets * steps,
        "base and experts": sets * scores,
    }
    # An expert and its checkpoints; while it is trained, its state too.
    written = sets * numbers * NUMBER * (1 + kept) + 3 * NUMBER * numbers
    return bench, JobPlan(seconds, sets * len(groups), written=written)


def _heads(
    bench: Bench, suite: Suite, train: Mapping[str, Examples]
) -> tuple[dict[str, Head], float]:
    """Return a head of the right shape for each headed task, and the seconds of an example."""
    few = {task: one.first(FEW) for task, one in train.items() if suite.tasks[task].headed}

    def run() -> None:
        for task, one in few.items():
            widths[task] = head_features(bench.base, one, suite.tasks[task], BATCH).shape[-1]

    widths: dict[str, int] = {}
    spent = bench.timed(run)
    outputs = {task: suite.tasks[task].outputs for task in few}
    heads = {
        task: Head(torch.zeros(outputs[task], width), torch.zeros(outputs[task]))
        for task, width in widths.items()
    }
    return heads, spent / max(sum(map(len, few.values())), 1)
