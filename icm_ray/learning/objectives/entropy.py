"""Entropy of what a task's head says of each input."""

from dataclasses import dataclass

from icm_ray.base_model.decoding import Readout
from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.objectives.choices import CHOICES, ChoiceLoss
from icm_ray.learning.objectives.logits import HeadLoss, asked, entropies
from icm_ray.learning.objectives.protocol import Scaling, TaskObjective


@dataclass(frozen=True)
class HeadEntropy:
    """Entropy of the head's class probabilities, or of the choices', in nats.

    Paper: AdaMerging, arXiv 2310.02575, Eq. 5.
    """

    readout: Readout | None = None
    scaling: Scaling = "none"

    def of(self, inputs: TaskInputs) -> TaskObjective | None:
        """Return the task's objective; None for a regression, which has no entropy."""
        if inputs.kind == CHOICES:
            return ChoiceLoss(self.readout, entropies)
        return HeadLoss(inputs, entropies) if asked(inputs) == "classification" else None
