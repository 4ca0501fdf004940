"""Entropy of a language model's next tokens: greedy answers, then one teacher-forced pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from icm_ray.evidence.decoding import Readout, greedy
from icm_ray.evidence.readers import Answered, Batch, pad_batch
from icm_ray.learning.heads import entropy
from icm_ray.learning.inputs import Seen, TaskInputs
from icm_ray.learning.objectives import Measured, Memory, Scaling


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

    readout: Readout
    max_new_tokens: int = 1
    end: int | None = None
    reduction: Literal["mean", "sum"] = "mean"
    scaling: Scaling = "none"

    def of(self, inputs: TaskInputs) -> "_Tokens":
        """Return the task's objective."""
        return _Tokens(self)


class _Tokens:
    hidden, compares, modules = True, False, ()

    def __init__(self, options: TokenEntropy) -> None:
        self.options = options

    def remember(self, batch: Batch, expert: Seen, base: Seen) -> Memory:
        """Return what of expert and base the measure compares with."""
        return {}

    def answer(self, model: nn.Module, batches: Sequence[Batch]) -> list[Batch]:
        """Return the batches with what the model as it stands answers to them, decoded at once."""
        prompts = [ids[m].tolist() for b in batches for ids, m in zip(b.ids, b.mask, strict=True)]
        options = self.options
        answers = greedy(model, options.readout, prompts, options.max_new_tokens, options.end)
        pairs = list(zip(prompts, answers, strict=True))
        made, start = [], 0
        for batch in batches:
            own = pairs[start : start + len(batch.rows)]
            start += len(own)
            whole = pad_batch([p + a[:-1] for p, a in own], batch.rows.tolist(), 0)
            place = torch.arange(whole.ids.shape[1])[None]
            first = torch.tensor([len(prompt) - 1 for prompt, _ in own])[:, None]
            made.append(Answered(whole.ids, whole.mask, whole.rows, whole.mask & (place >= first)))
        return made

    def measure(self, batch: Batch, seen: Seen, memory: Memory) -> Measured:
        """Return sums by component, and how many things were summed."""
        assert isinstance(batch, Answered)
        assert seen.hidden is not None
        counts = batch.answers.to(seen.hidden.device)
        values = entropy(self.options.readout(seen.hidden[counts]))
        if self.options.reduction == "mean":
            values = values / counts.sum(1)[counts.nonzero()[:, 0]]
        return values.sum()[None], float(len(batch.rows))
