"""How each kind of task is answered: what an expert is trained by, and what is scored.

`ANSWERS` is the whole table; evaluation, fine-tuning and probes know nothing else of a kind.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from icm_ray.base_model.decoding import counted, greedy, next_token_nats, readout_of
from icm_ray.base_model.loading import Base
from icm_ray.base_model.readers import (
    Answered,
    Batch,
    Read,
    Reader,
    TextReader,
    by_length,
    pad_batch,
)
from icm_ray.base_model.states import hidden_states, in_order, pooled
from icm_ray.errors import RecipeError
from icm_ray.evaluation.generated import SCORERS
from icm_ray.evaluation.heads import Head, loss
from icm_ray.suites.tasks import Examples, Kind, Task

MakeBatch = Callable[[Sequence[int]], Batch]
"""Makes the batch of some examples, by their positions."""


@runtime_checkable
class Answer(Protocol):
    """One way of answering."""

    def batches(self, base: Base, examples: Examples, task: Task) -> MakeBatch:
        """Return what makes the batches an expert is trained on."""
        ...

    def loss(
        self, base: Base, head: nn.Linear | None, batch: Batch, targets: Tensor, task: Task
    ) -> Tensor:
        """Return the mean loss of a batch on the model as it stands.

        `targets` are the examples' own, standardised, in the order of the batch's rows.
        """
        ...

    def predict(
        self, base: Base, head: Head | None, examples: Examples, task: Task, size: int
    ) -> np.ndarray:
        """Return the predictions `metrics` scores, one row an example, `size` at a time."""
        ...


class _Headed:
    """A linear head on states: pooled ones, or those of an image's patches."""

    def __init__(self, dense: bool) -> None:
        self.dense = dense

    def batches(self, base: Base, examples: Examples, task: Task) -> MakeBatch:
        """Return what makes the batches an expert is trained on."""
        read = base.reader.read(examples.inputs, task.max_tokens)
        return lambda rows: base.reader.batch(read, rows)

    def loss(
        self, base: Base, head: nn.Linear | None, batch: Batch, targets: Tensor, task: Task
    ) -> Tensor:
        """Return the mean loss of a batch on the model as it stands."""
        assert head is not None
        logits = head(self._states(base.model, batch).to(head.weight.dtype))
        return loss(logits.flatten(0, -2), targets.flatten(), task)

    @torch.no_grad()
    def features(self, base: Base, examples: Examples, task: Task, size: int) -> Tensor:
        """Return what the head reads, `(examples, d_model)` or `(examples, patches, d_model)`."""
        make = self.batches(base, examples, task)
        read = base.reader.read(examples.inputs, task.max_tokens)
        batches = [make(rows) for rows in by_length(read, size)]
        parts = [self._states(base.model, batch).float().cpu() for batch in batches]
        return in_order(batches, parts)

    def predict(
        self, base: Base, head: Head | None, examples: Examples, task: Task, size: int
    ) -> np.ndarray:
        """Return the predictions `metrics` scores, one row an example."""
        assert head is not None
        return head.predict(self.features(base, examples, task, size), task)

    def _states(self, model: nn.Module, batch: Batch) -> Tensor:
        if not self.dense:
            return pooled(model, batch)
        return hidden_states(model, batch)[:, batch.prefix :]


class _NextToken:
    """The base's own head on every next token of a text."""

    def batches(self, base: Base, examples: Examples, task: Task) -> MakeBatch:
        """Return what makes the batches an expert is trained on."""
        read = base.reader.read(examples.inputs, task.max_tokens)
        return lambda rows: base.reader.batch(read, rows)

    def loss(
        self, base: Base, head: nn.Linear | None, batch: Batch, targets: Tensor, task: Task
    ) -> Tensor:
        """Return the mean loss of a batch on the model as it stands."""
        return _mean_nats(base, batch)

    @torch.no_grad()
    def predict(
        self, base: Base, head: Head | None, examples: Examples, task: Task, size: int
    ) -> np.ndarray:
        """Return nats, tokens and characters of each text; its first token is given."""
        read = base.reader.read(examples.inputs, task.max_tokens)
        batches = [base.reader.batch(read, rows) for rows in by_length(read, size)]
        parts = [_nats(base, batch).double().sum(1) for batch in batches]
        nats = in_order(batches, [part.cpu() for part in parts]).numpy()
        characters = [len(base.tokenizer.decode(ids[1:])) for ids in read]
        return np.stack([nats, [len(ids) - 1.0 for ids in read], characters], 1)


class _Decoded:
    """Greedy answers to prompts; training sees the loss of the answer's tokens alone."""

    def batches(self, base: Base, examples: Examples, task: Task) -> MakeBatch:
        """Return what makes the batches an expert is trained on."""
        prompts = base.reader.read(examples.inputs, task.max_tokens)
        return with_answers(base.reader, prompts, examples.answers, task)

    def loss(
        self, base: Base, head: nn.Linear | None, batch: Batch, targets: Tensor, task: Task
    ) -> Tensor:
        """Return the mean loss of a batch on the model as it stands."""
        assert isinstance(batch, Answered)
        return _mean_nats(base, batch)

    @torch.no_grad()
    def predict(
        self, base: Base, head: Head | None, examples: Examples, task: Task, size: int
    ) -> np.ndarray:
        """Return each answer's score by the task's metric."""
        prompts = base.reader.read(examples.inputs, task.max_tokens)
        end, readout, scores = _end(base.tokenizer), readout_of(base), np.zeros(len(prompts))
        for rows in by_length(prompts, size):
            asked = [prompts[row] for row in rows]
            said = greedy(base.model, readout, asked, task.max_new_tokens, end)
            texts = base.tokenizer.batch_decode(said, skip_special_tokens=True)
            for row, text in zip(rows, texts, strict=True):
                scores[row] = SCORERS[task.metric](text, examples.answers[row])
        return scores


def with_answers(reader: Reader, prompts: Read, answers: Sequence[str], task: Task) -> MakeBatch:
    """Return what makes batches of prompts that were read, each followed by its answer."""
    assert isinstance(reader, TextReader)
    end = _end(reader.tokenizer)
    spoken = reader.tokenizer(list(answers), add_special_tokens=False)["input_ids"]
    spoken = [[*ids[: task.max_new_tokens - 1], end] for ids in spoken]

    def make(rows: Sequence[int]) -> Answered:
        whole = pad_batch([prompts[row] + spoken[row] for row in rows], rows, 0)
        place = torch.arange(whole.ids.shape[1])[None]
        first = torch.tensor([len(prompts[row]) for row in rows])[:, None] - 1
        last = whole.mask.sum(1, keepdim=True) - 1
        said = (place >= first) & (place < last)
        return Answered(whole.ids, whole.mask, whole.rows, said)

    return make


def _end(tokenizer: Any) -> int:
    end = tokenizer.eos_token_id
    if end is None:
        raise RecipeError("base: its tokenizer has no token that ends a text, but answers need it.")
    return int(end)


def _nats(base: Base, batch: Batch) -> Tensor:
    return next_token_nats(hidden_states(base.model, batch), batch, readout_of(base))


def _mean_nats(base: Base, batch: Batch) -> Tensor:
    return _nats(base, batch).sum() / counted(batch).sum()


POOLED, PATCHES = _Headed(dense=False), _Headed(dense=True)

ANSWERS: Mapping[Kind, Answer] = {
    "classification": POOLED,
    "regression": POOLED,
    "dense_classification": PATCHES,
    "dense_regression": PATCHES,
    "language_modelling": _NextToken(),
    "generation": _Decoded(),
}
"""Each kind's way of answering."""


def answer_of(task: Task) -> Answer:
    """Return how a task is answered."""
    return ANSWERS[task.kind]


def head_features(base: Base, examples: Examples, task: Task, size: int) -> Tensor:
    """Return what a headed task's head reads, one row an example or patch, `(rows, d_model)`."""
    answer = answer_of(task)
    assert isinstance(answer, _Headed)
    return answer.features(base, examples, task, size).flatten(0, -2)
