"""A setting in, metrics out: merge in factor space, and measure on a base that is already there."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icm_ray.adapters.saving import as_stored
from icm_ray.base_model.loading import Base
from icm_ray.config import INPUT_BATCH, ObjectiveSpec
from icm_ray.evaluation.metrics import score
from icm_ray.evaluation.scoring import (
    BATCH,
    Memory,
    TaskData,
    TaskScore,
    evaluate,
    standing,
    values,
)
from icm_ray.evidence.tensors import Evidence
from icm_ray.files import sha256_of
from icm_ray.fusion.serial import Checkpoints, fusion_spec_of, objectives_of, train_fusion
from icm_ray.fusion.store import save_fusion
from icm_ray.fusion_vae.model import FusionModel
from icm_ray.learning.fixed import FixedLosses
from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.learner import Run, learn
from icm_ray.learning.objectives import objective_of
from icm_ray.learning.recipes import grams_in, needs_grams, plan_of, spec_of
from icm_ray.learning.tasks import LearnerData
from icm_ray.merging.merge import merge
from icm_ray.methods import find_method
from icm_ray.search.objectives import LABEL_FREE, SCORED
from icm_ray.search.spaces import Setting
from icm_ray.types import Adapter

LEARN_BATCH = 32


@dataclass(frozen=True)
class Material:
    """All that trials share.

    Attributes:
        adapters: What is merged.
        data: Unlabelled inputs, and the heads and labels that some trial's objective reads.
        grams: Gram statistics, read a module at a time, if a method or a start needs them.
        scored: Validation examples by task.
        references: Predictions on them of "base" and "expert", by task.
        seed: Seed of merges and learners.
        threads: Kernel threads.
        checkpoints: What a Fusion-VAE is trained on, if one is.
        input_batch: Inputs of one inner step of its training.
    """

    adapters: Sequence[Adapter]
    data: LearnerData = field(default_factory=lambda: LearnerData({}))
    grams: Evidence | None = None
    scored: Mapping[str, TaskData] = field(default_factory=dict)
    references: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seed: int = 0
    threads: int = 1
    checkpoints: Checkpoints | None = None
    input_batch: int = INPUT_BATCH


@dataclass(frozen=True)
class Wanted:
    """What to measure of a setting.

    Attributes:
        setting: The merge.
        objectives: Names in AIMS.
        examples: Examples or inputs a task to look at; None: all.
        steps: Steps a learner makes before it is measured; None: all of them.
    """

    setting: Setting
    objectives: tuple[str, ...]
    examples: int | None = None
    steps: int | None = None


@dataclass(frozen=True)
class Measured:
    """Metrics of a setting, and the validation score of each task if there is one."""

    metrics: Mapping[str, float]
    scores: Mapping[str, float] = field(default_factory=dict)


class _Paused(Exception):
    """Raised in a learner's progress to look at it before it ends."""


class Measurer:
    """Holds a base and the material; nothing is loaded twice between two measurements."""

    def __init__(self, base: Base, material: Material) -> None:
        self.base, self.material = base, material
        self.known: dict[tuple[str, int | None], FixedLosses] = {}
        self.last: tuple[str, Adapter] | None = None
        self.fused: tuple[str, FusionModel] | None = None
        self.said: Memory = {}

    def measure(self, wanted: Wanted) -> Measured:
        """Merge and measure; the same order gives the same numbers on any worker.

        Raises:
            ICMRayError: the setting cannot be merged or learned.
        """
        adapter = self.merged(wanted.setting, wanted.steps)
        metrics: dict[str, float] = {
            "output_rank": float(adapter.max_rank),
            "output_bytes": float(_bytes(adapter)),
        }
        if wanted.setting.fuses and self.fused is not None:
            report = self.fused[1].report
            errors = report["reconstruction_error"].values()
            metrics["reconstruction_error"] = sum(errors) / len(errors)
            metrics["kl_total"] = report["kl_total"]
        scores: dict[str, float] = {}
        if set(SCORED) & set(wanted.objectives):
            scores, found = self._scores(adapter, wanted.examples)
            metrics |= found
        for name in LABEL_FREE:
            if name in wanted.objectives:
                losses = self._losses(name, wanted.examples).of(adapter)
                metrics[name] = sum(losses.values()) / len(losses)
        return Measured(metrics, scores)

    def merged(self, setting: Setting, steps: int | None = None) -> Adapter:
        """Return the merge of a setting, rounded as it would be stored; the last one is kept."""
        key = sha256_of([repr(setting), steps])
        if self.last is None or self.last[0] != key:
            self.last = (key, self._merge(setting, steps))
        return self.last[1]

    def _merge(self, setting: Setting, steps: int | None) -> Adapter:
        evidence: object | None = None
        material = self.material
        if setting.learns:
            evidence = self._learned(setting, steps)
        elif setting.fuses:
            evidence = self._fusion(setting)
        elif find_method(setting.method).needs == "gram_statistics":
            evidence = material.grams
        result = merge(
            material.adapters,
            setting.method,
            params=setting.params,
            evidence=evidence,
            output_rank=setting.rank,
            seed=material.seed,
        )
        return as_stored(result.adapter)

    def _learned(self, setting: Setting, steps: int | None) -> dict[str, Tensor]:
        """Learn as jobs.learn does, or as far as `steps`; a paused run goes on where it was."""
        spec = spec_of(setting.method, setting.learn)
        how = spec.optimisation
        adapters, known = self.material.adapters, self.material.grams
        grams = grams_in(known, [a.name for a in adapters]) if known and needs_grams(spec) else None
        tasks = self._tasks(spec.objective, how.batch)
        learning = plan_of(spec, adapters, grams).learning(self.base)
        last = min(steps or how.steps, how.steps)

        def pause(step: int, _loss: float) -> None:
            if last < how.steps and step >= last:
                raise _Paused

        if steps:  # it is looked at again, so its state is kept where it pauses
            how = how.model_copy(update={"save_every": last})
        learning = replace(learning, optimisation=how)
        scratch = self.scratch if steps else None
        run = Run(self.material.seed, self.material.threads, scratch, sha256_of(repr(setting)))
        try:
            return dict(learn(self.base.model, learning, tasks, run, progress=pause).tensors)
        except _Paused:
            return dict(learning.parameters.learned())

    def _fusion(self, setting: Setting) -> Path:
        """Return the folder of a trained Fusion-VAE; settings that differ in its use share it."""
        key = sha256_of(repr(setting.fusion))
        folder = self.scratch / "fusion"
        if self.fused is None or self.fused[0] != key:
            material = self.material
            assert material.checkpoints is not None, "gathered for every search that fuses"
            spec, run = fusion_spec_of(setting.fusion), Run(material.seed, material.threads)
            through = None
            for objective in objectives_of(spec):
                through = self.base, self._tasks(objective, material.input_batch)
            model = train_fusion(spec, material.adapters, material.checkpoints, through, run)
            shutil.rmtree(folder, ignore_errors=True)
            save_fusion(model, folder)
            self.fused = key, model
        return folder

    @cached_property
    def scratch(self) -> Path:
        """Folder of the one paused learner, and of the last Fusion-VAE."""
        return Path(tempfile.mkdtemp(prefix="icm_ray-search-"))

    def _scores(
        self, adapter: Adapter, examples: int | None
    ) -> tuple[dict[str, float], dict[str, float]]:
        data = {task: _first(item, examples) for task, item in self.material.scored.items()}
        threads = self.material.threads
        scores = evaluate(self.base, adapter, data, batch=BATCH, threads=threads, memory=self.said)
        # On everything, at each rung: an expert's score on a few examples may be zero, and nothing
        # can be compared with that.
        references = {
            who: {
                t: _score(self.material.scored[t], predictions)
                for t, predictions in by_task.items()
            }
            for who, by_task in self.material.references.items()
        }
        where = standing(scores, references["expert"], references["base"])
        return values(scores), {"validation_mean": where.mean, "validation_worst": where.worst}

    def _losses(self, name: str, examples: int | None) -> FixedLosses:
        if (name, examples) not in self.known:
            kind: Any = name
            spec = ObjectiveSpec(kind=kind)
            tasks = self._tasks(spec, LEARN_BATCH, examples)
            self.known[name, examples] = FixedLosses(
                self.base.model, objective_of(spec, self.base), tasks
            )
        return self.known[name, examples]

    def _tasks(
        self, objective: ObjectiveSpec, batch: int, examples: int | None = None
    ) -> list[TaskInputs]:
        """Return the tasks as jobs.learn would give them to the objective."""
        data = self.material.data.seen_by(objective).first(examples)
        return data.batched(self.material.adapters, self.base.reader, batch)


def _first(item: TaskData, examples: int | None) -> TaskData:
    return replace(item, examples=item.examples.first(examples))


def _score(item: TaskData, predictions: Any) -> TaskScore:
    own = predictions[: len(item.examples)]
    return TaskScore(score(item.task, own, item.examples.targets), own)


def _bytes(adapter: Adapter) -> int:
    size = torch.empty(0, dtype=adapter.dtype).element_size()
    return size * sum(f.a.numel() + f.b.numel() for f in adapter.modules.values())
