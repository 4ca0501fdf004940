"""Objectives that read a task's frozen head: entropy, distillation, labels."""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from icm_ray.base_model.decoding import Readout
from icm_ray.base_model.readers import Answered, Batch
from icm_ray.errors import RecipeError
from icm_ray.evaluation.heads import Head
from icm_ray.learning.inputs import Seen, TaskInputs
from icm_ray.learning.likelihood import ExpertsTokens, NextTokens, divergence
from icm_ray.learning.objectives import Measured, Memory, Scaling, TaskObjective


@dataclass(frozen=True)
class HeadEntropy:
    """Entropy of the head's class probabilities, in nats; classifications only.

    Paper: AdaMerging, arXiv 2310.02575, Eq. 5.
    """

    scaling: Scaling = "none"

    def of(self, inputs: TaskInputs) -> "_Logits | None":
        """Return the task's objective; None for a regression, which has no entropy."""
        return _Logits(inputs, _entropy) if _asks(inputs) == "classification" else None


@dataclass(frozen=True)
class Distillation:
    """The merge's answers through the task's head should be the expert's.

    Kullback-Leibler divergence from the expert's class probabilities, or the squared difference of
    standardised predictions; divided by the base's, whose loss is then 1. A language model's head
    is the base's own: of texts every next token counts, of prompts those of the expert's greedy
    answer, decoded once (arXiv 1606.07947, with the whole distributions of arXiv 1503.02531).

    Attributes:
        readout: A language model's head.
        end: Token that ends an answer, or None.
    """

    readout: Readout | None = None
    end: int | None = None
    scaling: Scaling = "energy"

    def of(self, inputs: TaskInputs) -> TaskObjective | None:
        """Return the task's objective; None without a head."""
        if inputs.kind in ("language_modelling", "generation"):
            return ExpertsTokens(self.readout, inputs.max_new_tokens, self.end)
        known = {"classification": divergence, "regression": _squared}
        asks = _asks(inputs)
        return _Logits(inputs, known[asks]) if asks in known else None


@dataclass(frozen=True)
class Supervised:
    """Cross-entropy, or the squared error of standardised targets, on a few labelled examples.

    A language model's texts are their own labels, answers those of prompts; `readout` gives logits.

    Divided by its value at the start, so that neither kind of task drowns the other.
    """

    readout: Readout | None = None
    scaling: Scaling = "start"

    def of(self, inputs: TaskInputs) -> TaskObjective | None:
        """Return the task's objective; None without a head and labels, texts or answers."""
        answered = any(isinstance(batch, Answered) for batch in inputs.batches)
        if inputs.kind == "language_modelling" or answered:
            return NextTokens(self.readout)
        known = {"classification": _cross_entropy, "regression": _squared}
        asks = _asks(inputs)
        if asks not in known or inputs.targets is None:
            return None
        return _Logits(inputs, known[asks], inputs.targets)


def _asks(inputs: TaskInputs) -> str | None:
    """Return what a head is asked for each row it reads: an example, or a patch of one."""
    return inputs.kind.removeprefix("dense_") if inputs.kind else None


class _Logits:
    """A loss of the head's logits, and of the expert's logits or the labels."""

    hidden, modules = True, ()

    def __init__(self, inputs: TaskInputs, loss: "_Loss", targets: Tensor | None = None) -> None:
        if inputs.head is None:
            raise RecipeError(f"task {inputs.name!r}: has no head, which the objective reads.")
        self.head: Head = inputs.head
        self.dense = inputs.dense
        self.loss, self.targets = loss, targets
        self.compares = targets is None and loss is not _entropy

    def _logits(self, batch: Batch, seen: Seen) -> Tensor:
        read = seen.read(batch, self.dense).float()
        return read @ self.head.weight.T.to(read) + self.head.bias.to(read)

    def remember(self, batch: Batch, expert: Seen, base: Seen) -> Memory:
        """Return what of expert and base the measure compares with."""
        expected = self._logits(batch, expert)
        energy = self.loss(self._logits(batch, base), expected).sum()
        return {"expected": expected, "energy": energy[None]}

    def measure(self, batch: Batch, seen: Seen, memory: Memory) -> Measured:
        """Return sums by component, and how many things were summed."""
        logits = self._logits(batch, seen)
        expected = memory.get("expected", logits)
        if self.targets is not None:
            expected = self.targets[batch.rows].flatten().to(logits.device)
        return self.loss(logits, expected).sum()[None], float(len(logits))


@runtime_checkable
class _Loss(Protocol):
    def __call__(self, logits: Tensor, expected: Tensor) -> Tensor: ...


def _entropy(logits: Tensor, expected: Tensor) -> Tensor:
    return entropy(logits)


def entropy(logits: Float[Tensor, "*rows classes"]) -> Float[Tensor, "*rows"]:
    """Return the entropy of each row's softmax, in nats, float32."""
    log = logits.float().log_softmax(-1)
    return -(log.exp() * log).sum(-1)


def _cross_entropy(logits: Tensor, expected: Tensor) -> Tensor:
    return F.cross_entropy(logits, expected.long(), reduction="none")


def _squared(logits: Tensor, expected: Tensor) -> Tensor:
    wanted = expected if expected.ndim == 1 else expected[:, 0]
    return (logits[:, 0] - wanted.float()).square()
