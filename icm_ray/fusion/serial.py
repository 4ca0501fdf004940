"""A Fusion-VAE from adapters and their checkpoints in one process, start to end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icm_ray.base_model.loading import Base
from icm_ray.checkpoint import Checkpoint
from icm_ray.config import FusionSpec, ObjectiveSpec, RepresentationSpec, changed
from icm_ray.errors import InputError
from icm_ray.finetuning.trajectory import evenly_spaced
from icm_ray.fusion.base_side import BaseSide, inner_objective
from icm_ray.fusion.data import FusionTable, Sample, samples_of
from icm_ray.fusion.diagnosis import with_size
from icm_ray.fusion.meta import MetaTraining
from icm_ray.fusion.train import STATE, Progress, check_kept, finished, train
from icm_ray.fusion_vae.layout import Layout
from icm_ray.fusion_vae.model import FusionModel
from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.learner import Run
from icm_ray.linalg.threads import kernel_threads
from icm_ray.types import Adapter

Through = tuple[Base, Sequence[TaskInputs]]
"""The frozen base, and every task's inputs for the inner loss."""


@dataclass(frozen=True)
class Checkpoints:
    """What a Fusion-VAE is trained on, apart from the base.

    Attributes:
        samples: Checkpoints and the finished adapter of every task.
        vectors: `(d,)` task vector (Eq. 1) of every task.
    """

    samples: Sequence[Sample]
    vectors: Mapping[str, Tensor]

    @classmethod
    def read(
        cls,
        adapters: Sequence[Adapter],
        trajectories: Mapping[str, Path],
        vectors: Mapping[str, Tensor],
    ) -> "Checkpoints":
        """Return the adapters and, where a task has a folder of them, its checkpoints."""
        samples = [s for a in adapters for s in samples_of(a, trajectories.get(a.name))]
        return cls(samples, vectors)

    def encoded(
        self, spec: RepresentationSpec, adapters: Sequence[Adapter]
    ) -> tuple[Layout, FusionTable]:
        """Return the layout fitted on the checkpoints a recipe takes, and their table in it."""
        samples = _taken(self.samples, spec.checkpoints)
        kinds = {path: kind for adapter in adapters for path, kind in adapter.layouts.items()}
        layout = Layout.fit(spec, samples, kinds)
        vectors = told_vectors(self.vectors, spec.task_vectors)
        return layout, FusionTable.of(layout, samples, vectors)


def join(model: FusionModel, adapters: Sequence[Adapter], known: Checkpoints) -> FusionModel:
    """Return a model that knows some more tasks; nothing is trained.

    Args:
        model: A trained Fusion-VAE.
        adapters: The finished adapter of every new task.
        known: Their checkpoints, which are averaged with them in the latent space, and their task
            vectors.

    Raises:
        InputError: see `check_joins`, or a module or a task vector is not of the model's shape.
    """
    check_joins(model, [adapter.name for adapter in adapters])
    for adapter in sorted(adapters, key=lambda one: one.name):
        before = [s.modules for s in known.samples if s.task == adapter.name and not s.is_final]
        vector = known.vectors[adapter.name]
        model = model.joined(adapter.name, adapter.modules, vector, adapter.fingerprint, before)
    return with_size(model, adapters)


def check_joins(model: FusionModel, tasks: Sequence[str]) -> None:
    """Raise InputError if a model knows a task already, or was told nothing of its own tasks."""
    problems = []
    if twice := sorted({*tasks} & {*model.tasks}):
        problems.append(f"adapters: {', '.join(twice)}: known to the Fusion-VAE already.")
    if (which := model.report.get("task_vectors", "own")) != "own":
        problems.append(
            f"joins: trained with representation.task_vectors {which} but own is expected, or a "
            "new task's vector says nothing. Train another one."
        )
    if problems:
        raise InputError(problems)


def _taken(samples: Sequence[Sample], count: int | None) -> list[Sample]:
    """Return the finished adapters, and `count` evenly spaced checkpoints of each task."""
    if count is None:
        return list(samples)
    taken = [sample for sample in samples if sample.is_final]
    for task in dict.fromkeys(sample.task for sample in samples):
        before = [s for s in samples if s.task == task and not s.is_final]
        taken += evenly_spaced(before[::-1], count)  # the latest one first
    return taken


def told_vectors(vectors: Mapping[str, Tensor], which: str) -> dict[str, Tensor]:
    """Return what the network is told of each task, as `RepresentationSpec.task_vectors` says."""
    names = sorted(vectors)
    if which == "shuffled":  # by one place, so that no task keeps its own
        return {name: vectors[names[index - 1]] for index, name in enumerate(names)}
    if which == "none":
        return {name: torch.zeros_like(vector) for name, vector in vectors.items()}
    return dict(vectors)


def fusion_spec_of(changes: Mapping[str, Any]) -> FusionSpec:
    """Return the default recipe of a Fusion-VAE with changes, parts within parts.

    Raises:
        RecipeError: changes name what does not exist, or a value is out of range.
    """
    return changed(FusionSpec(), changes, "fusion")


def runs_base(spec: FusionSpec) -> bool:
    """Say whether training runs the base and its inputs."""
    return spec.meta_steps > 0 and spec.inner.loss != "reconstruction"


def objectives_of(spec: FusionSpec) -> list[ObjectiveSpec]:
    """Return what training minimises through the base: its inner loss, if it runs it."""
    return [inner_objective(spec.inner)] if runs_base(spec) else []


def train_fusion(
    spec: FusionSpec,
    adapters: Sequence[Adapter],
    known: Checkpoints,
    through: Through | None = None,
    run: Run | None = None,
    *,
    progress: Progress | None = None,
) -> FusionModel:
    """Train on one process what `jobs.train_fusion` trains with DeepSpeed on many.

    Args:
        spec: Representation, network and both stages.
        adapters: The finished adapter of every task.
        known: Checkpoints and task vectors.
        through: The frozen base and what the inner loss runs through it; None where `runs_base`
            is false.
        run: Seed of the weights and of every draw, kernel threads, and where state is kept.
        progress: Told about each step.

    Raises:
        RecipeError: the inner loss does not fit the tasks, or the loss is no number any more.
    """
    run = run or Run()
    with kernel_threads(run.threads):
        layout, table = known.encoded(spec.representation, adapters)
    side = BaseSide(*through) if runs_base(spec) and through is not None else None
    meta = MetaTraining.build(spec, layout, table, side, run.seed)
    checkpoint = Checkpoint(run.scratch / STATE, run.key) if run.scratch else None
    history = train(meta, threads=run.threads, checkpoint=checkpoint, progress=progress)
    check_kept(history)
    return finished(meta, history, adapters)
