"""A learner's tasks: each adapter with its inputs, head and labels, and what identifies them."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from icm_ray.adapters import AdapterFile
from icm_ray.base_model import readers
from icm_ray.base_model.loading import load_reader
from icm_ray.base_model.readers import by_length
from icm_ray.base_model.states import batches_of
from icm_ray.config import DataSpec
from icm_ray.errors import RecipeError
from icm_ray.evaluation.answers import with_answers
from icm_ray.evaluation.experts import Expert
from icm_ray.evaluation.heads import Head
from icm_ray.files import sha256_of
from icm_ray.learning.inputs import TaskInputs
from icm_ray.suites import SUITES, Suite, Task, load_folder

EVIDENCE_BATCH = 32


MAX_TOKENS = 128
"""Tokens kept of a user's own text."""


Inputs = Mapping[str, tuple[readers.Inputs, int]]
"""By task: unlabelled texts or images, and the number of tokens to keep of each text."""


def load_inputs(data: DataSpec, tasks: Sequence[str]) -> dict[str, tuple[readers.Inputs, int]]:
    """Return each task's unlabelled inputs, from a suite or from a folder of the user's.

    Raises:
        RecipeError: neither or both of suite and path are named.
        InputError: a task has no data or too little.
    """
    if (data.suite is None) == (data.path is None):
        raise RecipeError("data: name either a suite or a path.")
    if data.suite is not None:
        if data.suite not in SUITES:
            raise RecipeError(f"data.suite: {data.suite!r} but one of {', '.join(SUITES)}.")
        suite = SUITES[data.suite]
        limit = data.inputs_per_task
        return {
            t: (suite.load(t, data.split, limit).inputs, suite.tasks[t].max_tokens) for t in tasks
        }
    folder = Path(str(data.path))
    found = {t: load_folder(folder, t).texts for t in tasks}
    return {t: (texts[: data.inputs_per_task], MAX_TOKENS) for t, texts in found.items()}


def inputs_key(inputs: readers.Inputs, max_tokens: int) -> str:
    """Return what identifies one task's inputs."""
    if isinstance(inputs, np.ndarray):
        return sha256_of([list(inputs.shape), hashlib.sha256(inputs.tobytes()).hexdigest()])
    return sha256_of([list(inputs), max_tokens])


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


def readable_experts(
    suite: Suite,
    experts: Mapping[str, Expert],
    tasks: Iterable[str],
    data: DataSpec,
    *,
    labelled: bool,
) -> dict[str, Readable]:
    """Return what objectives may read of some tasks: heads, and labels if they are supervised.

    Args:
        suite: What the tasks are.
        experts: By task, whose heads are read.
        tasks: Names of the tasks.
        data: Which inputs the labels belong to.
        labelled: Whether labels may be seen.
    """
    return {
        task: Readable(
            suite.tasks[task],
            experts[task].head(),
            suite.load(task, data.split, data.inputs_per_task).labels if labelled else None,
        )
        for task in tasks
    }


def task_inputs(
    files: Sequence[AdapterFile],
    inputs: Inputs,
    readable: Mapping[str, Readable],
    base: Path,
    batch: int,
) -> list[TaskInputs]:
    """Return every task's adapter with its inputs in batches, in the order of names.

    Args:
        files: The adapters.
        inputs: Unlabelled inputs by task.
        readable: Heads and labels by task, where there are any.
        base: Folder of the base, for its tokenizer.
        batch: Inputs a batch.
    """
    reader = load_reader(base)
    made = []
    for file in sorted(files, key=lambda file: file.name):
        known = readable.get(file.name)
        if known is not None and known.answered:
            read = reader.read(*inputs[file.name])
            make = with_answers(reader, read, known.targets or (), known.task)
            batches = [make(rows) for rows in by_length(read, batch)]
        else:
            batches = batches_of(reader, *inputs[file.name], batch)
        if known is None:
            made.append(TaskInputs(file.load(), batches))
            continue
        head, targets = known.head, None
        if head is not None and known.targets is not None:
            values = torch.tensor(known.targets, dtype=torch.float64)
            targets = ((values - head.mean) / head.std).float()
        kind, longest = known.task.kind, known.task.max_new_tokens
        made.append(TaskInputs(file.load(), batches, head, kind, targets, longest))
    return made


def heads_key(readable: Mapping[str, Readable]) -> str:
    """Return what identifies the heads that objectives read, and whether they read labels."""
    heads = {
        task: [known.head.weight.tolist(), known.head.bias.tolist(), known.targets is not None]
        if known.head is not None
        else [known.task.kind, known.targets]
        if known.answered
        else known.task.kind
        for task, known in readable.items()
    }
    return sha256_of(heads)
