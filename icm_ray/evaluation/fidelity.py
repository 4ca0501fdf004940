"""How far a model says what a task's expert says: a score that needs no labels.

Classes and choices: 1 - the total variation between the two probabilities. Numbers: r2 of ours
against the expert's. Texts: 1 - the total variation between the next token's probabilities, at each
place of the text, or of the expert's own greedy answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from icm_ray.base_model.decoding import TOKENS_AT_ONCE, answered, counted, readout_of
from icm_ray.base_model.loading import Base
from icm_ray.base_model.prompts import ends_of, is_chat
from icm_ray.base_model.readers import Batch, by_length
from icm_ray.base_model.states import hidden_states, pooled
from icm_ray.evaluation.choices import Chosen, choice_batches, choice_scores
from icm_ray.evaluation.heads import Head
from icm_ray.suites.tasks import Examples, Task


@dataclass(frozen=True)
class Asked:
    """A task's examples, and what reads the answers.

    Attributes:
        task: The task.
        examples: Its examples.
        head: Its expert's head; None if the base answers by itself.
        size: Examples a forward.
    """

    task: Task
    examples: Examples
    head: Head | None
    size: int


@dataclass(frozen=True)
class Said:
    """What an expert says of a task's examples.

    Attributes:
        batches: What it was asked, with its own answers where it was asked for some.
        rows: The examples of each batch.
        values: Of each batch: logits of classes or choices, numbers, or hidden states at the
            places that count.
    """

    batches: Sequence[Batch]
    rows: Sequence[list[int]]
    values: Sequence[Tensor]


@torch.no_grad()
def said_by(base: Base, asked: Asked) -> Said:
    """Return what the model as it stands, an expert's, says."""
    read = base.reader.read(asked.examples.inputs, asked.task.max_tokens)
    rows = by_length(read, asked.size)
    make = partial(base.reader.batch, read)
    if asked.task.chooses:
        make = choice_batches(base.reader, asked.examples.inputs, asked.task.max_tokens)
    batches = [make(own) for own in rows]
    if asked.task.kind == "generation":
        end = ends_of(base.tokenizer, is_chat(asked.examples.texts[0]))
        longest = asked.task.max_new_tokens
        batches = [
            batch
            for one in batches
            for batch in answered(base.model, readout_of(base), [one], longest, end)
        ]
    return Said(batches, rows, [_value(base, asked, batch) for batch in batches])


@torch.no_grad()
def fidelity(base: Base, asked: Asked, expert: Said) -> np.ndarray:
    """Return how near the model as it stands is to an expert, one row an example.

    Classes and choices `(examples,)`; numbers `(examples, 2)`, ours and the expert's; texts
    `(examples, 2)`, the sum over places and their number.
    """
    result = np.zeros((len(asked.examples), 2))
    for batch, rows, theirs in zip(expert.batches, expert.rows, expert.values, strict=True):
        ours = _value(base, asked, batch)
        if asked.task.kind == "regression":
            scale = (asked.head.std, asked.head.mean) if asked.head else (1.0, 0.0)
            both = torch.stack([ours[:, 0], theirs[:, 0]], 1).double().cpu().numpy()
            result[rows] = both * scale[0] + scale[1]
        elif _is_text(asked.task):
            result[rows] = _by_place(base, batch, ours, theirs)
        else:
            result[rows, 0] = _agreement(ours, theirs).double().cpu().numpy()
    return result[:, 0] if asked.task.is_class else result


def _value(base: Base, asked: Asked, batch: Batch) -> Tensor:
    if _is_text(asked.task):
        hidden = hidden_states(base.model, batch)
        return hidden[:, :-1][counted(batch).to(hidden.device)]
    if isinstance(batch, Chosen):
        return choice_scores(hidden_states(base.model, batch), batch, readout_of(base))
    assert asked.head is not None
    return asked.head.logits(pooled(base.model, batch, asked.head.pooling).float())


def _is_text(task: Task) -> bool:
    return task.kind in ("generation", "language_modelling")


def _agreement(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return 1 - the total variation of each row's probabilities."""
    gap = ours.float().softmax(-1) - theirs.float().softmax(-1)
    return 1 - gap.abs().sum(-1) / 2


def _by_place(base: Base, batch: Batch, ours: Tensor, theirs: Tensor) -> np.ndarray:
    readout, shown = readout_of(base), counted(batch)
    both = zip(ours.split(TOKENS_AT_ONCE), theirs.split(TOKENS_AT_ONCE), strict=True)
    agreements = torch.cat([_agreement(readout(a), readout(b)).cpu() for a, b in both])
    sums = torch.zeros(len(shown), dtype=torch.float64)
    sums.index_add_(0, shown.nonzero()[:, 0], agreements.double())
    return torch.stack([sums, shown.sum(1).double()], 1).numpy()
