"""How each kind of task is answered: what an expert is trained by, and what is scored.

`ANSWERS` is the whole table; evaluation, fine-tuning and probes know nothing else of a kind.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from icm_ray.base_model.decoding import counted, greedy, next_token_nats, readout_of
from icm_ray.base_model.loading import Base
from icm_ray.base_model.prompts import answer_ids, end_of, is_chat
from icm_ray.base_model.readers import Answered, Batch, Inputs, Reader, TextReader, by_length
from icm_ray.base_model.readers import with_answers as followed
from icm_ray.base_model.states import Pooling, States, hidden_states, in_order, states_of
from icm_ray.errors import InputError
from icm_ray.evaluation.choices import Chosen, choice_batches, choice_scores
from icm_ray.evaluation.corpus import CORPUS, counts_of
from icm_ray.evaluation.detection import (
    Grid,
    assigned,
    box_loss,
    check_size,
    decoded,
    grid_of,
)
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
        self, base: Base, head: nn.Linear | None, states: States, targets: Tensor, task: Task
    ) -> Tensor:
        """Return the mean loss of a batch from its states.

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
        """Return what makes the batches an expert is trained on.

        Raises:
            InputError: each patch has a value, and the base sees other patches.
        """
        read = base.reader.read(examples.inputs, task.max_tokens)
        if self.dense:
            self._check(base.reader.batch(read, [0]), examples, task)
        return lambda rows: base.reader.batch(read, rows)

    def _check(self, one: Batch, examples: Examples, task: Task) -> None:
        seen, known = one.mask.shape[1] - one.prefix, examples.targets.shape[1]
        if seen != known:
            raise InputError(
                f"{task.name}: {known} values an image but the base sees {seen} patches of it. "
                "Give one value a patch."
            )

    def labels(self, base: Base, examples: Examples, task: Task) -> np.ndarray:
        """Return what a head is fitted to, one row for each row of `head_features`."""
        return examples.targets.flatten()

    def loss(
        self, base: Base, head: nn.Linear | None, states: States, targets: Tensor, task: Task
    ) -> Tensor:
        """Return the mean loss of a batch from its states."""
        assert head is not None
        logits = head(self._read(states).to(head.weight))
        return loss(logits.flatten(0, -2), targets.flatten(), task)

    @torch.no_grad()
    def features(
        self, base: Base, examples: Examples, task: Task, size: int, how: Pooling = "mean"
    ) -> Tensor:
        """Return what the head reads, `(examples, d_model)` or `(examples, patches, d_model)`."""
        make = self.batches(base, examples, task)
        read = base.reader.read(examples.inputs, task.max_tokens)
        batches = [make(rows) for rows in by_length(read, size)]
        passes = (states_of(base.model, [batch])[0] for batch in batches)
        return in_order(batches, [self._read(states, how).float().cpu() for states in passes])

    def predict(
        self, base: Base, head: Head | None, examples: Examples, task: Task, size: int
    ) -> np.ndarray:
        """Return the predictions `metrics` scores, one row an example."""
        assert head is not None
        features = self.features(base, examples, task, size, head.pooling)
        return self.said(base, head, features, examples, task)

    def said(
        self, base: Base, head: Head, features: Tensor, examples: Examples, task: Task
    ) -> np.ndarray:
        """Return the predictions of a head that reads some features."""
        return head.predict(features, task)

    def _read(self, states: States, how: Pooling = "mean") -> Tensor:
        return states.hidden[:, states.batch.prefix :] if self.dense else states.pooled(how)


class _Detects(_Headed):
    """A linear head on an image's patches whose outputs are boxes; `detection` says how."""

    def __init__(self) -> None:
        super().__init__(dense=True)

    def _check(self, one: Batch, examples: Examples, task: Task) -> None:
        assert examples.images is not None
        check_size(task.name, examples.images, one)

    def labels(self, base: Base, examples: Examples, task: Task) -> np.ndarray:
        """Return what each patch should say, `(rows, 5)`."""
        boxes = torch.from_numpy(examples.targets)
        return assigned(boxes, self._grid(base, examples, task)).flatten(0, 1).numpy()

    def loss(
        self, base: Base, head: nn.Linear | None, states: States, targets: Tensor, task: Task
    ) -> Tensor:
        """Return the mean loss of a batch from its states."""
        assert head is not None
        logits = head(self._read(states).to(head.weight))
        expected = assigned(targets.to(logits.device), grid_of(states.batch))
        return box_loss(logits.flatten(0, 1), expected.flatten(0, 1)).mean()

    def said(
        self, base: Base, head: Head, features: Tensor, examples: Examples, task: Task
    ) -> np.ndarray:
        """Return the boxes that a head finds."""
        return decoded(head.logits(features), self._grid(base, examples, task))

    def _grid(self, base: Base, examples: Examples, task: Task) -> Grid:
        return grid_of(self.batches(base, examples.first(1), task)([0]))


class _Spoken:
    """The base's own head on tokens, whose loss is all that training sees."""

    def loss(
        self, base: Base, head: nn.Linear | None, states: States, targets: Tensor, task: Task
    ) -> Tensor:
        """Return the mean loss of a batch from its states."""
        return _nats(base, states).sum() / counted(states.batch).sum()


class _NextToken(_Spoken):
    """The base's own head on every next token of a text, or of what follows a prompt."""

    def batches(self, base: Base, examples: Examples, task: Task) -> MakeBatch:
        """Return what makes the batches an expert is trained on."""
        read = base.reader.read(examples.inputs, task.max_tokens)
        return lambda rows: base.reader.batch(read, rows)

    @torch.no_grad()
    def predict(
        self, base: Base, head: Head | None, examples: Examples, task: Task, size: int
    ) -> np.ndarray:
        """Return nats, tokens and characters of each text; its first token is given."""
        read = base.reader.read(examples.inputs, task.max_tokens)
        batches = [base.reader.batch(read, rows) for rows in by_length(read, size)]
        passes = (states_of(base.model, [batch])[0] for batch in batches)
        parts = [_nats(base, states).double().sum(1).cpu() for states in passes]
        nats = in_order(batches, parts).numpy()
        first = [getattr(ids, "start", None) or 1 for ids in read]
        shown = [ids[start:] for ids, start in zip(read, first, strict=True)]
        characters = [len(base.tokenizer.decode(ids)) for ids in shown]
        return np.stack([nats, [float(len(ids)) for ids in shown], characters], 1)


class _Decoded(_Spoken):
    """Greedy answers to prompts; training sees the loss of the answer's tokens alone."""

    def batches(self, base: Base, examples: Examples, task: Task) -> MakeBatch:
        """Return what makes the batches an expert is trained on."""
        return with_answers(base.reader, examples.inputs, examples.answers, task)

    def loss(
        self, base: Base, head: nn.Linear | None, states: States, targets: Tensor, task: Task
    ) -> Tensor:
        """Return the mean loss of a batch from its states."""
        assert isinstance(states.batch, Answered)
        return super().loss(base, head, states, targets, task)

    @torch.no_grad()
    def predict(
        self, base: Base, head: Head | None, examples: Examples, task: Task, size: int
    ) -> np.ndarray:
        """Return each answer's score by the task's metric."""
        prompts = base.reader.read(examples.inputs, task.max_tokens)
        end = end_of(base.tokenizer, is_chat(examples.texts[0]))
        readout, scores = readout_of(base), {}
        for rows in by_length(prompts, size):
            asked = base.reader.batch(prompts, rows)
            said = greedy(base.model, readout, asked, task.max_new_tokens, end)
            texts = base.tokenizer.batch_decode(said, skip_special_tokens=True)
            for row, text in zip(rows, texts, strict=True):
                scores[row] = _judged(task, text, examples.answers[row])
        return np.array([scores[row] for row in range(len(prompts))])


def _judged(task: Task, said: str, wanted: str) -> float | list[float]:
    """Return an answer's score, or what it counts in that of the whole corpus."""
    if task.metric in CORPUS:
        return counts_of(task.metric, said, wanted)
    return (task.scorer or SCORERS[task.metric])(said, wanted)


class _Chooses(_Spoken):
    """Whichever of some texts the base finds likeliest after the prompt."""

    def batches(self, base: Base, examples: Examples, task: Task) -> MakeBatch:
        """Return what makes the batches an expert is trained on: what is right follows."""
        make = choice_batches(base.reader, examples.inputs, task.max_tokens)
        right = examples.targets.astype(int)
        return lambda rows: make(rows, [int(right[row]) for row in rows])

    @torch.no_grad()
    def predict(
        self, base: Base, head: Head | None, examples: Examples, task: Task, size: int
    ) -> np.ndarray:
        """Return the index of each example's likeliest choice."""
        prompts = base.reader.read(examples.inputs, task.max_tokens)
        make = choice_batches(base.reader, examples.inputs, task.max_tokens)
        chosen = np.zeros(len(prompts))
        for rows in by_length(prompts, size):
            batch = make(rows)
            assert isinstance(batch, Chosen)
            scores = choice_scores(hidden_states(base.model, batch), batch, readout_of(base))
            chosen[rows] = scores.argmax(-1).cpu().numpy()
        return chosen


def with_answers(reader: Reader, inputs: Inputs, answers: Sequence[str], task: Task) -> MakeBatch:
    """Return what makes batches of prompts, each followed by its answer."""
    assert isinstance(reader, TextReader)
    prompts = reader.read(inputs, task.max_tokens)
    pairs = zip(inputs, answers, strict=True)
    spoken = [answer_ids(reader.tokenizer, *pair, task.max_new_tokens) for pair in pairs]
    return lambda rows: followed(reader.batch(prompts, rows), [spoken[row] for row in rows])


def _nats(base: Base, states: States) -> Tensor:
    return next_token_nats(states.hidden, states.batch, readout_of(base))


POOLED, PATCHES, BOXES = _Headed(dense=False), _Headed(dense=True), _Detects()
CHOOSES = _Chooses()

ANSWERS: Mapping[Kind, Answer] = {
    "classification": POOLED,
    "regression": POOLED,
    "dense_classification": PATCHES,
    "dense_regression": PATCHES,
    "detection": BOXES,
    "language_modelling": _NextToken(),
    "generation": _Decoded(),
    "multiple_choice": CHOOSES,
}
"""Each kind's way of answering."""


def answer_of(task: Task) -> Answer:
    """Return how a task is answered."""
    return CHOOSES if task.chooses else ANSWERS[task.kind]


def headed(task: Task) -> _Headed:
    """Return how a task is answered that a head of its own reads."""
    answer = answer_of(task)
    assert isinstance(answer, _Headed)
    return answer


def head_features(
    base: Base, examples: Examples, task: Task, size: int, how: Pooling = "mean"
) -> Tensor:
    """Return what a headed task's head reads, one row an example or patch, `(rows, d_model)`."""
    return headed(task).features(base, examples, task, size, how).flatten(0, -2)
