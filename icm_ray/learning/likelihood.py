"""The supervised objective of a language model: the text or the answer says what comes next."""

import torch
from torch import nn

from icm_ray.errors import RecipeError
from icm_ray.evidence.decoding import Readout
from icm_ray.evidence.readers import Answered, Batch
from icm_ray.learning.inputs import Seen
from icm_ray.learning.objectives import Measured, Memory

ROWS_AT_ONCE = 4
"""Texts whose logits are held at once."""


class NextTokens:
    """Mean negative log-likelihood of a text's tokens after the first, or its answer's, in nats."""

    hidden, compares = True, False
    modules: tuple[str, ...] = ()

    def __init__(self, readout: Readout | None) -> None:
        self.readout = readout

    def remember(self, batch: Batch, expert: Seen, base: Seen) -> Memory:
        """Return what of expert and base the measure compares with."""
        return {}

    def measure(self, batch: Batch, seen: Seen, memory: Memory) -> Measured:
        """Return sums by component, and how many things were summed."""
        if self.readout is None:
            raise RecipeError("objective: supervised needs the base, to read its tokens.")
        assert seen.hidden is not None
        shown = batch.answers[:, :-1] if isinstance(batch, Answered) else batch.mask[:, 1:]
        shown = shown.to(seen.hidden.device)
        wanted = batch.ids[:, 1:].to(seen.hidden.device)
        parts = []
        for start in range(0, len(wanted), ROWS_AT_ONCE):
            some = slice(start, start + ROWS_AT_ONCE)
            logits = self.readout(seen.hidden[some, :-1][shown[some]]).float()
            nats = nn.functional.cross_entropy(logits, wanted[some][shown[some]], reduction="sum")
            parts.append(nats)
        return torch.stack(parts).sum()[None], float(shown.sum())
