"""Entropy of what a task's head says of each input."""

from dataclasses import dataclass

from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.objectives.logits import HeadLoss, asked, entropies
from icm_ray.learning.objectives.protocol import Scaling, TaskObjective


@dataclass(frozen=True)
class HeadEntropy:
    """Entropy of the head's class probabilities, in nats; classifications only.

    Paper: AdaMerging, arXiv 2310.02575, Eq. 5.
    """

    scaling: Scaling = "none"

    def of(self, inputs: TaskInputs) -> TaskObjective | None:
        """Return the task's objective; None for a regression, which has no entropy."""
        return HeadLoss(inputs, entropies) if asked(inputs) == "classification" else None
