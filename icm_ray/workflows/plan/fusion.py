"""What a Fusion-VAE's training will take: task vectors, then a step of each of its stages."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from icm_ray.base_model.states import batches_of
from icm_ray.config import FusionSpec, TrainFusionRecipe
from icm_ray.distributed.evidence import EVIDENCE_BATCH
from icm_ray.distributed.fusion_worker import FusionOrder, alone
from icm_ray.evidence.gather import gather
from icm_ray.fusion.base_side import BaseSide
from icm_ray.fusion.meta import MetaTraining
from icm_ray.fusion.serial import Checkpoints, runs_base
from icm_ray.learning.tasks import LearnerData
from icm_ray.merging.estimate import warnings_of
from icm_ray.types import Adapter
from icm_ray.workflows.plan.measured import FEW, Bench
from icm_ray.workflows.plan.planned import JobPlan, count, workers_here
from icm_ray.workflows.train_fusion import FusionMaterial, asked_of

STATES = 3
"""Numbers kept of each parameter: itself and two moments."""
TRAIN_SECONDS = 10.0
"""Start and end of Ray Train: an estimate, of four processes one after the other that import torch
on a machine that does nothing else."""
KEPT = 2
"""Checkpoints of a training that are there at once."""


def plan_fusion(recipe: TrainFusionRecipe) -> tuple[Bench, JobPlan]:
    """Gather task vectors of a few inputs, and make a few steps on DeepSpeed's engine."""
    training, base = asked_of(recipe)
    files, data, spec = training.files, training.data, recipe.fusion
    adapters = [file.load() for file in files]
    known = Checkpoints.read(adapters, training.trajectories, {})  # as the driver holds them
    bench = Bench(base, recipe.resources)
    known, one = with_vectors(bench, known, adapters, data)
    seconds, warnings = {"task vectors": one * count(data)}, tuple(warnings_of(files))
    if recipe.joins:
        return bench, JobPlan(seconds, len(files), warnings=warnings)
    workers, tasks = workers_here(recipe.resources, len(files)), []
    if runs_base(spec):  # the inner loss runs base and experts once over each input
        seconds["base and experts"] = one * count(data)
        tasks = data.batched(adapters, bench.base.reader, recipe.input_batch)
    together = min(spec.tasks_per_step or len(files), len(files))
    share = spec.model_copy(update={"tasks_per_step": math.ceil(together / workers)})
    meta = training_of(bench, FusionMaterial(share, recipe.engine, adapters, known, tasks))
    order = FusionOrder(share, recipe.engine, meta.layout, tasks, None, recipe.resources, 0)
    started = time.monotonic()
    with alone(meta, order) as step:
        seconds["starting DeepSpeed"] = workers * (time.monotonic() - started)
        seconds[f"{spec.steps} steps"] = workers * stages_seconds(bench, spec, step)
    starts = TRAIN_SECONDS + (bench.start_seconds if tasks else 0.0)  # with a base of their own
    table = meta.table.x.nbytes + meta.table.v.nbytes
    numbers = sum(leaf.nbytes for leaf in meta.vae.parameters())
    written = table + (1 + KEPT * STATES) * numbers
    return bench, JobPlan(seconds, len(files), starts=starts, written=written, warnings=warnings)


def with_vectors(
    bench: Bench, known: Checkpoints, adapters: Sequence[Adapter], data: LearnerData
) -> tuple[Checkpoints, float]:
    """Return checkpoints with task vectors of a few inputs, and the seconds of one input."""
    parts = {
        task: batches_of(bench.base.reader, inputs[:FEW], tokens, EVIDENCE_BATCH)
        for task, (inputs, tokens) in data.inputs.items()
    }

    def run() -> None:
        vectors.update({a.name: gather(bench.base.model, a, parts[a.name]) for a in adapters})

    vectors = {}
    spent = bench.timed(run)
    known = replace(known, vectors={name: one.task_vector for name, one in vectors.items()})
    return known, spent / sum(one.inputs for one in vectors.values())


def training_of(bench: Bench, material: FusionMaterial) -> MetaTraining:
    """Return a training that has made no step."""
    layout, table = material.known.encoded(material.spec.representation, material.adapters)
    side = BaseSide(bench.base, material.tasks) if material.tasks else None
    return MetaTraining.build(material.spec, layout, table, side)


def stages_seconds(bench: Bench, spec: FusionSpec, step: Callable[[int], object]) -> float:
    """Return the seconds of all steps, from the first one of each stage."""
    firsts = {0: spec.vae_steps, spec.vae_steps: spec.meta_steps}
    return sum(many * bench.timed(partial(step, first)) for first, many in firsts.items() if many)
