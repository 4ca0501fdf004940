"""Prompts with several texts that may follow: which one a language model finds likeliest."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from icm_ray.base_model.decoding import Readout, next_token_nats
from icm_ray.base_model.prompts import choice_ids
from icm_ray.base_model.readers import Answered, Inputs, Reader, TextReader, with_answers
from icm_ray.inputs import Prompt

IMPOSSIBLE = -1e9
"""Log-likelihood of a choice that is none: no probability, and a difference that is a number."""


@dataclass(frozen=True)
class Chosen(Answered):
    """Each prompt once with each of its choices.

    Attributes:
        owner: Which of the batch's prompts a sequence is of, in their order.
    """

    owner: Int[Tensor, " examples"]


@runtime_checkable
class MakeChoices(Protocol):
    """Makes a batch of some prompts, by their positions."""

    def __call__(self, rows: Sequence[int], only: Sequence[int] | None = None) -> Answered:
        """Return each prompt with each of its choices, or with `only` one of each."""
        ...


def choice_batches(reader: Reader, inputs: Inputs, max_tokens: int) -> MakeChoices:
    """Return what makes batches of prompts with their choices; long prompts leave them room."""
    assert isinstance(reader, TextReader)
    prompts, said = [], []
    for asked in inputs:
        assert isinstance(asked, Prompt)
        choices = [choice_ids(reader.tokenizer, asked, choice) for choice in asked.choices]
        room = max(map(len, choices))
        limit = min(max_tokens, reader.longest - room)
        prompts += reader.read([asked], limit)
        said.append(choices)

    def make(rows: Sequence[int], only: Sequence[int] | None = None) -> Answered:
        own = [range(len(said[row])) for row in rows] if only is None else [[i] for i in only]
        places = [(at, i) for at, indices in enumerate(own) for i in indices]
        sequence = [rows[at] for at, _ in places]
        batch = with_answers(
            reader.batch(prompts, sequence), [said[rows[at]][i] for at, i in places]
        )
        owner = torch.tensor([at for at, _ in places])
        whole = (batch.ids, batch.mask, batch.rows, batch.answers)
        return Chosen(*whole, owner, pixels=batch.pixels)

    return make


def choice_scores(
    hidden: Float[Tensor, "sequences tokens d_model"], batch: Chosen, readout: Readout
) -> Float[Tensor, "prompts choices"]:
    """Return the log-likelihood of each prompt's choices; IMPOSSIBLE where others have more."""
    likely = -next_token_nats(hidden, batch, readout).sum(1)
    counts = torch.bincount(batch.owner).tolist()
    rows = likely.split(counts)
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=IMPOSSIBLE)
