"""Losses of how likely a language model finds each of a prompt's choices."""

import torch
from torch import Tensor

from icm_ray.base_model.decoding import Readout
from icm_ray.base_model.states import Batch
from icm_ray.evaluation.choices import Chosen, choice_scores
from icm_ray.learning.inputs import Seen
from icm_ray.learning.objectives.logits import Loss, entropies
from icm_ray.learning.objectives.protocol import Measured, Memory, TaskObjective
from icm_ray.learning.objectives.tokens import needed

CHOICES = "multiple_choice"
"""The kind of a task whose batches hold choices."""


class ChoiceLoss(TaskObjective):
    """A loss of the choices' log-likelihoods, and of the expert's or of which one is right."""

    def __init__(self, readout: Readout | None, loss: Loss, targets: Tensor | None = None) -> None:
        self.readout, self.loss, self.targets = readout, loss, targets
        self.compares = targets is None and loss is not entropies

    def _scores(self, batch: Batch, seen: Seen) -> Tensor:
        assert isinstance(batch, Chosen)
        assert seen.hidden is not None
        return choice_scores(seen.hidden, batch, needed(self.readout, "choices"))

    def remember(self, batch: Batch, expert: Seen, base: Seen) -> Memory:
        """Return what of the expert the measure compares with."""
        expected = self._scores(batch, expert)
        energy = self.loss(self._scores(batch, base), expected).sum()
        return {"expected": expected, "energy": energy[None]}

    def measure(self, batch: Batch, seen: Seen, memory: Memory) -> Measured:
        """Return sums by component, and how many things were summed."""
        assert isinstance(batch, Chosen)
        scores = self._scores(batch, seen)
        expected = memory.get("expected", scores)
        if self.targets is not None:
            first = torch.cat([batch.owner[:1] == 0, batch.owner[1:] != batch.owner[:-1]])
            expected = self.targets[batch.rows[first]].to(scores.device)
        return self.loss(scores, expected).sum()[None], float(len(scores))
