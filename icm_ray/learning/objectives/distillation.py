"""A merge's answers beside those of each task's expert."""

from dataclasses import dataclass
from functools import partial

from icm_ray.base_model.decoding import Readout
from icm_ray.evaluation.detection import box_divergence
from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.objectives.choices import CHOICES, ChoiceLoss
from icm_ray.learning.objectives.logits import HeadLoss, Loss, asked, divergence, squared_error
from icm_ray.learning.objectives.protocol import Scaling, TaskObjective
from icm_ray.learning.objectives.tokens import ExpertsTokens


@dataclass(frozen=True)
class Distillation:
    """The merge's answers through the task's head should be the expert's.

    Kullback-Leibler divergence from the expert's class probabilities, the squared difference of
    standardised predictions, or for boxes `box_divergence`; divided by the base's, whose loss is
    then 1, or by the start's where that is larger and `scaling` says so. A language model's head
    is the base's own: of texts every next token counts, of prompts those of the expert's greedy
    answer, decoded once (arXiv 1606.07947, with the whole distributions of arXiv 1503.02531).

    Attributes:
        readout: A language model's head.
        end: Token that ends an answer, or None.
        temperature: Of class probabilities (arXiv 1503.02531, section 2); tokens keep theirs.
    """

    readout: Readout | None = None
    end: int | None = None
    temperature: float = 1.0
    scaling: Scaling = "energy"

    def of(self, inputs: TaskInputs) -> TaskObjective | None:
        """Return the task's objective; None without a head."""
        if inputs.kind in ("language_modelling", "generation"):
            end = self.end if inputs.end is None else inputs.end
            return ExpertsTokens(self.readout, inputs.max_new_tokens, end)
        soft = partial(divergence, temperature=self.temperature)
        if inputs.kind == CHOICES:
            return ChoiceLoss(self.readout, soft)
        known: dict[str | None, Loss] = {
            "classification": soft,
            "regression": squared_error,
            "detection": partial(box_divergence, temperature=self.temperature),
        }
        asks = asked(inputs)
        return HeadLoss(inputs, known[asks]) if asks in known else None
