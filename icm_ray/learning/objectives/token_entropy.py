"""Entropy of a language model's next tokens: greedy answers, then one teacher-forced pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from icm_ray.base_model.decoding import Readout, answered
from icm_ray.base_model.readers import Answered, Batch
from icm_ray.learning.inputs import Seen, TaskInputs
from icm_ray.learning.objectives.logits import entropy
from icm_ray.learning.objectives.protocol import Measured, Memory, Scaling, TaskObjective
from icm_ray.learning.objectives.tokens import needed


@dataclass(frozen=True)
class TokenEntropy:
    """Entropy of the next-token distributions while the merge answers greedily.

    Paper: AdaMerging, arXiv 2310.02575, Eq. 5, for language models as in arXiv 2603.26317: the
    last position of the prompt (`max_new_tokens=1`), or every position of the answer.
    Differs: the references run and back-propagate the whole prefix once a token. Here the answer is
    decoded without gradients and with a cache, and one teacher-forced pass gives the same
    entropies and the same gradient.

    Attributes:
        readout: Gives the logits.
        max_new_tokens: Longest answer.
        end: Token that ends an answer, or None.
        reduction: Mean over an example's positions, or their sum, where long answers weigh more.
    """

    readout: Readout | None = None
    max_new_tokens: int = 1
    end: int | None = None
    reduction: Literal["mean", "sum"] = "mean"
    scaling: Scaling = "none"

    def of(self, inputs: TaskInputs) -> "_Tokens":
        """Return the task's objective."""
        return _Tokens(self)


class _Tokens(TaskObjective):
    compares = False

    def __init__(self, options: TokenEntropy) -> None:
        self.options = options

    def answered(self, merge: nn.Module, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Return the batches with what the model as it stands answers to them."""
        how = self.options
        readout = needed(how.readout, "token_entropy")
        return answered(merge, readout, batches, how.max_new_tokens, how.end)

    def measure(self, batch: Batch, seen: Seen, memory: Memory) -> Measured:
        """Return sums by component, and how many things were summed."""
        assert isinstance(batch, Answered)
        assert seen.hidden is not None
        counts = batch.answers.to(seen.hidden.device)
        values = entropy(needed(self.options.readout, "token_entropy")(seen.hidden[counts]))
        if self.options.reduction == "mean":
            values = values / counts.sum(1)[counts.nonzero()[:, 0]]
        return values.sum()[None], float(len(batch.rows))
