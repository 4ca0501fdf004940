"""A setting in, metrics out: merge in factor space, and measure on a base that is already there."""

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from icm_ray.adapters.saving import as_stored
from icm_ray.base_model.loading import Base
from icm_ray.base_model.readers import Inputs
from icm_ray.base_model.states import batches_of
from icm_ray.config import INPUT_BATCH, ObjectiveSpec
from icm_ray.evaluation.heads import Head
from icm_ray.evaluation.metrics import score
from icm_ray.evaluation.scoring import TaskData, evaluate, standing, values
from icm_ray.files import sha256_of
from icm_ray.fusion.serial import Checkpoints, fusion_spec_of, train_fusion
from icm_ray.fusion.store import save_fusion
from icm_ray.fusion_vae.model import FusionModel
from icm_ray.learning.fixed import FixedLosses
from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.learner import Run, learn
from icm_ray.learning.recipes import needs_grams, objective_of, plan_of, spec_of
from icm_ray.merging.merge import merge
from icm_ray.methods import find_method
from icm_ray.methods.table import GRAMS
from icm_ray.search.coefficients import coefficients_of
from icm_ray.search.objectives import LABEL_FREE, SCORED
from icm_ray.search.spaces import Setting
from icm_ray.suites.tasks import Examples, Task
from icm_ray.types import Adapter

BATCH = 64
LEARN_BATCH = 32


@dataclass(frozen=True)
class Material:
    """All that trials share.

    Attributes:
        adapters: What is merged.
        inputs: By task: unlabelled texts or images, and the tokens to keep of each.
        heads: By task: what is predicted, and the frozen head if it has one, where objectives
            may read it.
        labels: By task: targets of the inputs, for supervised learners.
        grams: Gram statistics, `<module>.gram.<task>`, if a method or a start needs them.
        scored: Validation examples by task.
        references: Predictions on them of "base" and "expert", by task.
        seed: Seed of merges and learners.
        threads: Kernel threads.
        groups: Number of layer groups.
        checkpoints: What a Fusion-VAE is trained on, if one is.
        input_batch: Inputs of one inner step of its training.
    """

    adapters: Sequence[Adapter]
    inputs: Mapping[str, tuple[Inputs, int]] = field(default_factory=dict)
    heads: Mapping[str, tuple[Task, Head | None]] = field(default_factory=dict)
    labels: Mapping[str, Sequence[float]] = field(default_factory=dict)
    grams: Mapping[str, Tensor] = field(default_factory=dict)
    scored: Mapping[str, TaskData] = field(default_factory=dict)
    references: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seed: int = 0
    threads: int = 1
    groups: int = 1
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
        if setting.layers:
            modules = sorted({m for a in material.adapters for m in a.modules})
            prints = {a.name: a.fingerprint for a in material.adapters}
            evidence = dict(coefficients_of(setting, modules, prints, material.groups).tensors)
        elif setting.learns:
            evidence = self._learned(setting, steps)
        elif setting.fuses:
            evidence = self._fusion(setting)
        elif find_method(setting.method).needs == GRAMS:
            evidence = dict(material.grams)
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
        grams = self._grams_by_task() if needs_grams(spec) else None
        tasks = self._inputs(how.batch, None)
        plan = plan_of(spec, self.material.adapters, grams)
        parameters = plan.parameters()
        last = min(steps or how.steps, how.steps)

        def pause(step: int, _loss: float) -> None:
            if last < how.steps and step >= last:
                raise _Paused

        run = Run(
            self.material.seed,
            how.tasks_per_forward,
            how.save_memory,
            self.material.threads,
            save_every=last,
        )
        try:
            learned = learn(
                self.base.model,
                tasks,
                parameters,
                plan.objective(self.base),
                plan.optimisation(),
                run,
                scratch=self.scratch if steps else None,
                key=sha256_of(repr(setting)),
                progress=pause,
            )
        except _Paused:
            return dict(parameters.learned())
        return dict(learned.tensors)

    def _fusion(self, setting: Setting) -> Path:
        """Return the folder of a trained Fusion-VAE; settings that differ in its use share it."""
        key = sha256_of(repr(setting.fusion))
        folder = self.scratch / "fusion"
        if self.fused is None or self.fused[0] != key:
            material = self.material
            assert material.checkpoints is not None, "gathered for every search that fuses"
            model = train_fusion(
                fusion_spec_of(setting.fusion),
                material.adapters,
                material.checkpoints,
                base=self.base,
                tasks=self._inputs(material.input_batch, None),
                seed=material.seed,
                threads=material.threads,
            )
            shutil.rmtree(folder, ignore_errors=True)
            save_fusion(model, folder)
            self.fused = key, model
        return folder

    @cached_property
    def scratch(self) -> Path:
        """Folder of the one paused learner, and of the last Fusion-VAE."""
        return Path(tempfile.mkdtemp(prefix="icm_ray-search-"))

    def _grams_by_task(self) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.material.grams.items():
            module, _, task = name.partition(".gram.")
            found.setdefault(module, {})[task] = tensor
        return found

    def _scores(
        self, adapter: Adapter, examples: int | None
    ) -> tuple[dict[str, float], dict[str, float]]:
        data = {task: _first(item, examples) for task, item in self.material.scored.items()}
        found = values(
            evaluate(self.base, adapter, data, batch=BATCH, threads=self.material.threads)
        )
        # On everything, at each rung: an expert's score on a few examples may be zero, and nothing
        # can be compared with that.
        references = {
            who: {t: _score(self.material.scored[t], told) for t, told in by_task.items()}
            for who, by_task in self.material.references.items()
        }
        where = standing(found, references["expert"], references["base"])
        return found, {"validation_mean": where.mean, "validation_worst": where.worst}

    def _losses(self, name: str, examples: int | None) -> FixedLosses:
        if (name, examples) not in self.known:
            spec: Any = ObjectiveSpec(kind=name)  # type: ignore[arg-type]
            tasks = self._inputs(LEARN_BATCH, examples)
            self.known[name, examples] = FixedLosses(
                self.base.model, objective_of(spec, None), tasks
            )
        return self.known[name, examples]

    def _inputs(self, batch: int, examples: int | None) -> list[TaskInputs]:
        made = []
        for adapter in sorted(self.material.adapters, key=lambda adapter: adapter.name):
            inputs, max_tokens = self.material.inputs[adapter.name]
            batches = batches_of(self.base.reader, inputs[:examples], max_tokens, batch)
            if adapter.name not in self.material.heads:
                made.append(TaskInputs(adapter, batches))
                continue
            task, head = self.material.heads[adapter.name]
            labels, targets = self.material.labels.get(adapter.name), None
            if head is not None and labels is not None:
                numbers = torch.tensor(labels[:examples], dtype=torch.float64)
                targets = ((numbers - head.mean) / head.std).float()
            longest = task.max_new_tokens
            made.append(TaskInputs(adapter, batches, head, task.kind, targets, longest))
        return made


def _first(item: TaskData, examples: int | None) -> TaskData:
    whole = item.examples
    if examples is None or examples >= len(whole):
        return item
    part = Examples(
        texts=whole.texts[:examples],
        targets=whole.targets[:examples],
        documents=whole.documents[:examples],
        answers=whole.answers[:examples],
        images=None if whole.images is None else whole.images[:examples],
    )
    return TaskData(item.task, part, item.head)


def _score(item: TaskData, predictions: Any) -> float:
    return score(item.task, predictions[: len(item.examples)], item.examples.targets).value


def _bytes(adapter: Adapter) -> int:
    size = torch.empty(0, dtype=adapter.dtype).element_size()
    return size * sum(f.a.numel() + f.b.numel() for f in adapter.modules.values())
