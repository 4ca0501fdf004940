"""An objective's losses of merges that are already made, whatever made them."""

from collections.abc import Sequence

import torch
from torch import nn

from icm_ray.base_model.low_rank import applied
from icm_ray.config import OptimisationSpec
from icm_ray.learning.forward import observe
from icm_ray.learning.gradients import Learning, TaskGradients
from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.learner import covered_tasks
from icm_ray.learning.objectives.protocol import Objective
from icm_ray.learning.parameters import Coefficients
from icm_ray.learning.terms import own_terms
from icm_ray.types import Adapter


class FixedLosses:
    """What an objective says of any merged adapter; experts and base are run once, at the start."""

    def __init__(self, model: nn.Module, objective: Objective, tasks: Sequence[TaskInputs]) -> None:
        """Run experts and base over the inputs.

        Args:
            model: The frozen base.
            objective: What is measured.
            tasks: Every task of the merge; those the objective says nothing about are left out.

        Raises:
            RecipeError: the objective covers no task.
        """
        terms = own_terms([task.adapter for task in tasks])
        # Nothing moves, so what the parameters are does not matter.
        still = Learning(Coefficients(terms, 1 / len(tasks)), objective, OptimisationSpec())
        self.side = TaskGradients(model, still, tasks)
        self.tasks = covered_tasks(tasks, objective)
        for task in self.tasks:
            self.side.start(task)

    @torch.no_grad()
    def of(self, adapter: Adapter) -> dict[str, float]:
        """Return each task's loss of the base plus `adapter`, a mean over its inputs."""
        side, losses = self.side, {}
        with applied(side.model, adapter):
            for task in self.tasks:
                objective, sums, total = side.objectives[task], [], 0.0
                for batch, memory in zip(
                    side.tasks[task].batches, side.memories[task], strict=True
                ):
                    seen = observe(side.model, batch, objective.modules, hidden=objective.hidden)
                    parts, count = objective.measure(batch, seen, memory)
                    sums.append(parts.double().cpu())
                    total += count
                components = torch.stack(sums).sum(0) / total
                losses[task] = float((components * side.scales[task]).mean())
        return losses
