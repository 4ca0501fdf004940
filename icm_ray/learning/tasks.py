"""A learner's tasks: each adapter with its inputs, head and labels, and what identifies them.

Whatever learns takes them from here, so a search's trial and the job that repeats it see the same.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from icm_ray.base_model import readers
from icm_ray.base_model.prompts import ends_of, is_chat
from icm_ray.base_model.readers import Reader, TextReader, by_length
from icm_ray.base_model.states import Batch, batches_of
from icm_ray.config import USUAL_INPUTS, DataSpec, ObjectiveSpec
from icm_ray.errors import RecipeError
from icm_ray.evaluation.answers import with_answers
from icm_ray.evaluation.choices import choice_batches
from icm_ray.evaluation.detection import assigned, check_size, grid_of
from icm_ray.evaluation.experts import HEAD, Expert, find_experts, heads_of, ready_experts
from icm_ray.evaluation.heads import Head
from icm_ray.files import sha256_of
from icm_ray.inputs import image_bytes
from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.objectives import OBJECTIVES, reads_heads
from icm_ray.suites import Suite, Task, find_suite, load_folder
from icm_ray.types import Adapter

MAX_TOKENS = 128
"""Tokens kept of a user's own text."""

Inputs = Mapping[str, tuple[readers.Inputs, int]]
"""By task: unlabelled texts or images, and the number of tokens to keep of each text."""


@dataclass(frozen=True)
class Readable:
    """What objectives that read answers may see of a task.

    Attributes:
        task: Says what the head predicts.
        head: The frozen head; None if the base answers by itself.
        targets: Labels of the task's inputs, answers in words for a generation, for supervised
            objectives; else None.
    """

    task: Task
    head: Head | None
    targets: Sequence[Any] | None = None

    @property
    def answered(self) -> bool:
        """Say whether the labels are answers that follow the inputs."""
        return self.task.kind == "generation" and self.targets is not None

    @property
    def key(self) -> str:
        """What identifies head and labels."""
        weights = self.head.described if self.head else None
        targets = None if self.targets is None else list(self.targets)
        return sha256_of([self.task.kind, self.task.max_new_tokens, weights, targets])

    def standardised(self) -> Tensor | None:
        """Return the labels by the head's mean and deviation, if there are a head and labels."""
        if self.targets is None or self.task.kind == "generation":
            return None
        values = torch.tensor(self.targets, dtype=torch.float64)
        if self.head is None:
            return values.float()
        return ((values - self.head.mean) / self.head.std).float()


@dataclass(frozen=True)
class LearnerData:
    """All that a learner may know of the tasks beside their adapters.

    Attributes:
        inputs: Unlabelled inputs by task.
        readable: Heads and labels by task, where an objective reads them.
    """

    inputs: Inputs
    readable: Mapping[str, Readable] = field(default_factory=dict)

    @property
    def key(self) -> dict[str, str]:
        """What identifies each task's data."""
        keys = {task: inputs_key(*inputs) for task, inputs in self.inputs.items()}
        for task, readable in self.readable.items():
            keys[task] = sha256_of([keys[task], readable.key])
        return keys

    def seen_by(self, objective: ObjectiveSpec) -> "LearnerData":
        """Return what one objective reads; of the rest it would make another loss."""
        if not reads_heads(objective):
            return replace(self, readable={})
        if OBJECTIVES[objective.kind].reads_labels:
            return self
        bare = {task: replace(one, targets=None) for task, one in self.readable.items()}
        return replace(self, readable=bare)

    def first(self, examples: int | None) -> "LearnerData":
        """Return the first examples of each task; None: all."""
        if examples is None:
            return self
        inputs = {t: (values[:examples], tokens) for t, (values, tokens) in self.inputs.items()}
        readable = {
            task: replace(one, targets=one.targets[:examples]) if one.targets is not None else one
            for task, one in self.readable.items()
        }
        return LearnerData(inputs, readable)

    def batched(self, adapters: Sequence[Adapter], reader: Reader, batch: int) -> list[TaskInputs]:
        """Return every adapter with its inputs in batches, in the order of names.

        Args:
            adapters: All adapters of the merge.
            reader: The base's tokenizer, or what reads its images.
            batch: Inputs a batch.
        """
        return [
            self._task(adapter, reader, batch) for adapter in sorted(adapters, key=lambda a: a.name)
        ]

    def _task(self, adapter: Adapter, reader: Reader, batch: int) -> TaskInputs:
        inputs, known = self.inputs[adapter.name], self.readable.get(adapter.name)
        if known is None:
            return TaskInputs(adapter, batches_of(reader, *inputs, batch))
        task, groups = known.task, by_length(reader.read(*inputs), batch)
        batches: Sequence[Batch]
        if known.answered:
            make = with_answers(reader, inputs[0], known.targets or (), task)
            batches = [make(rows) for rows in groups]
        elif task.chooses:
            choose = choice_batches(reader, *inputs)
            batches = [choose(rows) for rows in groups]
        else:
            batches = batches_of(reader, *inputs, batch)
        end = None
        if task.kind == "generation" and isinstance(reader, TextReader):
            end = ends_of(reader.tokenizer, is_chat(inputs[0][0]))
        targets = known.standardised()
        if targets is not None and task.kind == "detection":
            check_size(task.name, np.asarray(inputs[0]), batches[0])
            targets = assigned(targets, grid_of(batches[0]))
        return TaskInputs(
            adapter,
            batches,
            known.head,
            "multiple_choice" if task.chooses else task.kind,
            targets,
            task.max_new_tokens,
            end,
        )


def learner_data(
    data: DataSpec,
    tasks: Sequence[str],
    objectives: Sequence[ObjectiveSpec] = (),
    experts: Mapping[str, Expert] | None = None,
) -> LearnerData:
    """Return unlabelled inputs of some tasks, with heads and labels if an objective reads them.

    Args:
        data: Which inputs.
        tasks: Names of the tasks.
        objectives: All that will look at them.
        experts: By task, whose heads are read; see `experts_for`.
    """
    if not any(map(reads_heads, objectives)):
        return LearnerData(load_inputs(data, tasks))
    suite, heads = heads_of(find_suite(str(data.suite), "data.suite"), experts or {})
    labelled = any(OBJECTIVES[objective.kind].reads_labels for objective in objectives)
    limit = suite.limit(data.inputs_per_task, USUAL_INPUTS)
    if labelled and (bare := [name for name in tasks if not suite.task(name).labelled]):
        raise RecipeError(
            f"data: {', '.join(bare)}: no answers, but objective supervised reads some. Name the "
            "column of answers, or choose a method that needs none."
        )
    inputs, readable = {}, {}
    for name in tasks:
        task, examples = suite.task(name), suite.load(name, data.split, limit)
        inputs[name] = examples.inputs, task.max_tokens
        # A language model's texts are their own labels.
        has_labels = labelled and task.labelled and task.kind != "language_modelling"
        labels = examples.labels if has_labels else None
        readable[name] = Readable(task, heads.get(name), labels)
    return LearnerData(inputs, readable)


def experts_for(
    objective: ObjectiveSpec,
    heads: str | None,
    data: DataSpec,
    adapters: Iterable[tuple[str, Path]],
) -> dict[str, Expert]:
    """Return the experts whose heads an objective reads, none if it reads none.

    Args:
        objective: What is minimised.
        heads: Folder of experts; None: heads lie with the adapters.
        data: Which inputs.
        adapters: Name, which is the task's, and folder of each.

    Raises:
        RecipeError: it reads heads and one is not there, or the tasks' kinds are not known.
    """
    if not reads_heads(objective):
        return {}
    if data.suite is None:
        raise RecipeError(
            f"data.suite: missing but objective {objective.kind!r} must know what tasks ask for. "
            "Name a suite, or choose an objective that reads no heads."
        )
    ready = ready_experts(adapters)
    experts = find_experts(Path(heads)) if heads else ready
    if missing := sorted(set(ready) - set(experts)):
        raise RecipeError(f"heads: {heads}: none for {', '.join(missing)}. Name their experts.")
    known = {task: experts[task] for task in ready}
    if problems := headless(find_suite(data.suite, "data.suite"), known):
        raise RecipeError(problems)
    return known


def headless(suite: Suite, experts: Mapping[str, Expert]) -> list[str]:
    """Return a line for each expert that lacks the head its task is read through."""
    known = {name: expert for name, expert in experts.items() if name in suite}
    suite, heads = heads_of(suite, known)
    return [
        f"adapters: {name}: no {HEAD} in its folder or beside it, and no score or classifier in "
        f"the adapter, but {name} ({suite.task(name).kind}) is read through one. Put it there."
        for name in known
        if suite.task(name).headed and heads[name] is None
    ]


def load_inputs(data: DataSpec, tasks: Sequence[str]) -> dict[str, tuple[readers.Inputs, int]]:
    """Return each task's unlabelled inputs, from a suite or from a folder of the user's.

    Raises:
        RecipeError: neither or both of suite and path are named.
        InputError: a task has no data or too little.
    """
    if (data.suite is None) == (data.path is None):
        raise RecipeError("data: name either a suite or a path.")
    if data.suite is not None:
        suite = find_suite(data.suite, "data.suite")
        limit = suite.limit(data.inputs_per_task, USUAL_INPUTS)
        return {
            t: (suite.load(t, data.split, limit).inputs, suite.task(t).max_tokens) for t in tasks
        }
    texts = {t: load_folder(Path(str(data.path)), t).texts for t in tasks}
    return {t: (own[: data.most], MAX_TOKENS) for t, own in texts.items()}


def inputs_key(inputs: readers.Inputs, max_tokens: int) -> str:
    """Return what identifies one task's inputs."""
    if isinstance(inputs, np.ndarray):
        digest = hashlib.sha256()
        for part in image_bytes(inputs):
            digest.update(part)
        return sha256_of([list(inputs.shape), digest.hexdigest()])
    return sha256_of([list(inputs), max_tokens])
