"""The inner loss of Algorithm 1: what a decoded LoRA does inside of the frozen base."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from icm_ray.base_model.loading import Base
from icm_ray.base_model.states import Batch
from icm_ray.config import InnerSpec, ObjectiveSpec
from icm_ray.errors import RecipeError
from icm_ray.fusion_vae.layout import Layout
from icm_ray.learning.forward import merged, observe
from icm_ray.learning.gradients import compare, inverse
from icm_ray.learning.inputs import Seen, TaskInputs
from icm_ray.learning.objectives import INNER, objective_of
from icm_ray.learning.objectives.protocol import Memory, Scaling, TaskObjective
from icm_ray.learning.parameters import Frame


def inner_objective(spec: InnerSpec) -> ObjectiveSpec:
    """Return the learner's objective that an inner loss is."""
    kind: Any = INNER[spec.loss]
    return ObjectiveSpec(kind=kind)


class AdaptedBase(nn.Module):
    """The frozen base with the adapter that `vector` stands for; `vector` is a functional input.

    `torch.func.functional_call(adapted, {"vector": x}, (batch, objective))` runs the base with any
    x, and gradients flow to x.
    """

    def __init__(self, model: nn.Module, layout: Layout) -> None:
        super().__init__()
        self.model, self.layout = model, layout
        self.register_buffer("vector", torch.zeros(layout.size))

    def forward(self, batch: Batch, objective: TaskObjective) -> Seen:
        """Return what the objective asks to see, as far into the model as it asks."""
        vector: Tensor = self.vector  # type: ignore[assignment]
        parts = self.layout.parts(vector)
        kinds = self.layout.kinds
        frames = {
            path: Frame(part.left, part.right, None, kinds.get(path, "linear"))
            for path, part in parts.items()
        }
        with merged(self.model, frames, {path: part.core for path, part in parts.items()}):
            return observe(self.model, batch, objective.modules, hidden=objective.hidden)


class BaseSide:
    """Base, inputs and objectives of every task; expert and base run once over each input.

    Not a module on purpose: its parameters are never trained, saved or sent.
    """

    def __init__(self, base: Base, tasks: Sequence[TaskInputs]) -> None:
        """Take the frozen base and the tasks' inputs; nothing runs yet."""
        self.base, self.model = base, base.model
        self.tasks = {task.name: task for task in tasks}
        self.objectives: dict[str, TaskObjective | None] = {}
        self.kept: dict[str, tuple[list[Memory], Tensor]] = {}
        self.adapted: AdaptedBase | None = None
        self.scaling: Scaling = "none"

    def open(self, layout: Layout, spec: InnerSpec, *, new: bool = False) -> None:
        """Choose the objective; "start" of a scaling is the base's own value here.

        Args:
            layout: What vectors mean.
            spec: The inner loss.
            new: Whether a second batch is asked for in a step.

        Raises:
            RecipeError: the inner loss needs labels or heads that no task has, or a task has no
                second batch.
        """
        objective = objective_of(inner_objective(spec), self.base)
        objectives = {name: objective.of(task) for name, task in self.tasks.items()}
        if not any(objectives.values()):
            raise RecipeError(
                f"inner.loss: {spec.loss} says nothing about any of the tasks. Give heads and "
                "labels, or choose task_vector."
            )
        single = [n for n, one in objectives.items() if one and len(self.tasks[n].batches) < 2]
        if new and single:
            raise RecipeError(
                f"query: {', '.join(sorted(single))}: one batch but two are expected, or there are "
                "no new inputs. Give more inputs, lower input_batch, or set query to 0."
            )
        self.objectives, self.scaling, self.kept = objectives, objective.scaling, {}
        self.adapted = AdaptedBase(self.model, layout)

    def covers(self, task: str) -> bool:
        """Say whether the inner loss says anything about a task."""
        return self.objectives.get(task) is not None

    def loss(self, task: str, step: int, seed: int, vector: Tensor, *, new: bool) -> Tensor:
        """Return the scaled inner loss of one batch, differentiable in `vector`.

        Args:
            task: Whose inputs.
            step: Counts the batches of a task; see `TaskInputs.batch_number`.
            seed: Keys the order of batches.
            vector: `(D,)`.
            new: Another batch than that of the step.
        """
        objective, adapted = self.objectives[task], self.adapted
        assert objective is not None
        assert adapted is not None
        memories, scale = self._kept(task, objective)
        batches = self.tasks[task].batches
        number = (self.tasks[task].batch_number(seed, step) + new) % len(batches)
        batch = batches[number]
        seen = torch.func.functional_call(adapted, {"vector": vector}, (batch, objective))
        sums, count = objective.measure(batch, seen, memories[number])
        return (sums / count * scale.to(sums)).mean()

    def _kept(self, task: str, objective: TaskObjective) -> tuple[list[Memory], Tensor]:
        if task not in self.kept:
            inputs = self.tasks[task]
            memories, base, _, energy = compare(self.model, inputs, objective)
            scale = {"none": None, "energy": energy, "start": base}[self.scaling]
            self.kept[task] = memories, torch.ones_like(base) if scale is None else inverse(scale)
        return self.kept[task]
