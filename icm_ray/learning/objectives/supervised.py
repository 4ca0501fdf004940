"""A merge's answers beside a few labels."""

from dataclasses import dataclass

from icm_ray.base_model.decoding import Readout
from icm_ray.base_model.readers import Answered
from icm_ray.evaluation.detection import box_loss
from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.objectives.choices import CHOICES, ChoiceLoss
from icm_ray.learning.objectives.logits import HeadLoss, asked, cross_entropy, squared_error
from icm_ray.learning.objectives.protocol import Scaling, TaskObjective
from icm_ray.learning.objectives.tokens import NextTokens


@dataclass(frozen=True)
class Supervised:
    """Cross-entropy, or the squared error of standardised targets, on a few labelled examples.

    A language model's texts are their own labels, answers those of prompts; `readout` gives logits.

    Divided by its value at the start, so that neither kind of task drowns the other.
    """

    readout: Readout | None = None
    scaling: Scaling = "start"

    def of(self, inputs: TaskInputs) -> TaskObjective | None:
        """Return the task's objective; None without a head and labels, texts or answers."""
        if inputs.kind == CHOICES:
            labelled = inputs.targets is not None
            return ChoiceLoss(self.readout, cross_entropy, inputs.targets) if labelled else None
        answered = any(isinstance(batch, Answered) for batch in inputs.batches)
        if inputs.kind == "language_modelling" or answered:
            return NextTokens(self.readout)
        known = {
            "classification": cross_entropy,
            "regression": squared_error,
            "detection": box_loss,
        }
        asks = asked(inputs)
        if asks not in known or inputs.targets is None:
            return None
        return HeadLoss(inputs, known[asks], inputs.targets)
