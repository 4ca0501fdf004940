"""Losses of a language model's next tokens: as a text or answer has them, or an expert."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from icm_ray.base_model.decoding import TOKENS_AT_ONCE, Readout, answered, counted, next_token_nats
from icm_ray.base_model.readers import Answered, Batch
from icm_ray.errors import RecipeError
from icm_ray.learning.inputs import Seen
from icm_ray.learning.objectives.logits import divergence
from icm_ray.learning.objectives.protocol import Measured, Memory, TaskObjective


class NextTokens(TaskObjective):
    """Mean negative log-likelihood of a text's tokens after the first, or its answer's, in nats."""

    compares = False

    def __init__(self, readout: Readout | None) -> None:
        self.readout = readout

    def measure(self, batch: Batch, seen: Seen, memory: Memory) -> Measured:
        """Return sums by component, and how many things were summed."""
        assert seen.hidden is not None
        nats = next_token_nats(seen.hidden, batch, needed(self.readout, "supervised"))
        return nats.sum()[None], float(counted(batch).sum())


class ExpertsTokens(TaskObjective):
    """Mean divergence of the next token's distribution from the expert's, over a text or an answer.

    The expert's last hidden states are kept, not its logits, which are a vocabulary wide.
    """

    def __init__(self, readout: Readout | None, max_new_tokens: int, end: int | None) -> None:
        """Take the base's head and how long answers to prompts may be; 0: the inputs are texts."""
        self.readout, self.max_new_tokens, self.end = readout, max_new_tokens, end

    def taught(self, expert: nn.Module, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Return prompts with the expert's answers, and texts as they are."""
        if not self.max_new_tokens:
            return batches
        readout = needed(self.readout, "distillation")
        return answered(expert, readout, batches, self.max_new_tokens, self.end)

    def remember(self, batch: Batch, expert: Seen, base: Seen) -> Memory:
        """Return what of the expert the measure compares with."""
        states = self._states(batch, expert)
        energy = self._divergence(self._states(batch, base), states)
        return {"states": states, "energy": energy[None]}

    def measure(self, batch: Batch, seen: Seen, memory: Memory) -> Measured:
        """Return sums by component, and how many things were summed."""
        states = self._states(batch, seen)
        return self._divergence(states, memory["states"])[None], float(len(states))

    def _states(self, batch: Batch, seen: Seen) -> Tensor:
        assert seen.hidden is not None
        shown = batch.answers if isinstance(batch, Answered) else batch.mask
        return seen.hidden[shown.to(seen.hidden.device)]

    def _divergence(self, states: Tensor, expected: Tensor) -> Tensor:
        readout = needed(self.readout, "distillation")
        both = zip(states.split(TOKENS_AT_ONCE), expected.split(TOKENS_AT_ONCE), strict=True)
        return torch.stack(
            [divergence(readout(own), readout(theirs)).sum() for own, theirs in both]
        ).sum()


def needed(readout: Readout | None, objective: str) -> Readout:
    """Return the readout.

    Raises:
        RecipeError: there is none.
    """
    if readout is None:
        raise RecipeError(f"objective: {objective} needs the base, to read its tokens.")
    return readout
