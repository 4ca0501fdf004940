"""Entropy of a language model's next tokens: greedy answers, then one teacher-forced pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from icm_ray.evidence.base import to_device
from icm_ray.evidence.batches import Batch, pad_batch
from icm_ray.learning.heads import entropy
from icm_ray.learning.inputs import Seen, TaskInputs
from icm_ray.learning.objectives import Measured, Memory, Scaling

Readout = Callable[[Float[Tensor, "*rows d_model"]], Float[Tensor, "*rows vocabulary"]]
"""Last hidden states to logits over the vocabulary: the language-model head."""


@dataclass(frozen=True)
class Answered(Batch):
    """Prompts with the answers the merge gave.

    Attributes:
        answers: `(examples, tokens)`, True where the next token is one of the answer.
    """

    answers: Bool[Tensor, "examples tokens"]


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


@torch.no_grad()
def greedy(
    model: nn.Module,
    readout: Readout,
    prompts: list[list[int]],
    max_new_tokens: int,
    end: int | None = None,
) -> list[list[int]]:
    """Return each prompt's greedy continuation, up to and with the token that ends it.

    Prompts are padded on the left, so that all answers grow at the same place.
    """
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    mask = torch.arange(width)[None] >= width - lengths[:, None]
    answers: list[list[int]] = [[] for _ in prompts]
    cache: Any = None
    for _ in range(max_new_tokens):
        places = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "position_ids": places}
        seen = model(**to_device(inputs, model), past_key_values=cache, use_cache=True)
        cache = seen.past_key_values
        chosen = readout(seen.last_hidden_state[:, -1]).argmax(-1).cpu()
        for answer, token in zip(answers, chosen.tolist(), strict=True):
            if end is None or answer[-1:] != [end]:
                answer.append(token)
        if end is not None and all(answer[-1] == end for answer in answers):
            break
        ids, mask = chosen[:, None], torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return answers
