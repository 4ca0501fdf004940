"""Losses of what a task's frozen head makes of the hidden states."""

from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from icm_ray.base_model.readers import Batch
from icm_ray.errors import RecipeError
from icm_ray.evaluation.heads import Head
from icm_ray.learning.inputs import Seen, TaskInputs
from icm_ray.learning.objectives.protocol import Measured, Memory, TaskObjective


class HeadLoss(TaskObjective):
    """A loss of the head's logits, and of the expert's logits or the labels."""

    def __init__(self, inputs: TaskInputs, loss: "Loss", targets: Tensor | None = None) -> None:
        if inputs.head is None:
            raise RecipeError(f"task {inputs.name!r}: has no head, which the objective reads.")
        self.head: Head = inputs.head
        self.dense = inputs.dense
        self.loss, self.targets = loss, targets
        self.compares = targets is None and loss is not entropies

    def _logits(self, batch: Batch, seen: Seen) -> Tensor:
        return self.head.logits(seen.read(batch, self.dense, self.head.pooling).float())

    def remember(self, batch: Batch, expert: Seen, base: Seen) -> Memory:
        """Return what of the expert the measure compares with."""
        expected = self._logits(batch, expert)
        energy = self.loss(self._logits(batch, base), expected).sum()
        return {"expected": expected, "energy": energy[None]}

    def measure(self, batch: Batch, seen: Seen, memory: Memory) -> Measured:
        """Return sums by component, and how many things were summed."""
        logits = self._logits(batch, seen)
        expected = memory.get("expected", logits)
        if self.targets is not None:
            own = self.targets[batch.rows].to(logits.device)
            expected = own.flatten(0, 1) if self.dense else own
        return self.loss(logits, expected).sum()[None], float(len(logits))


def asked(inputs: TaskInputs) -> str | None:
    """Return what a head is asked for each row it reads: an example, or a patch of one."""
    return inputs.kind.removeprefix("dense_") if inputs.kind else None


@runtime_checkable
class Loss(Protocol):
    """A loss of each row: of its logits, and of what is expected there."""

    def __call__(self, logits: Tensor, expected: Tensor) -> Tensor:
        """Return one number a row."""
        ...


def entropies(logits: Tensor, expected: Tensor) -> Tensor:
    """Return each row's entropy; nothing is expected of it."""
    return entropy(logits)


def entropy(logits: Float[Tensor, "*rows classes"]) -> Float[Tensor, "*rows"]:
    """Return the entropy of each row's softmax, in nats, float32."""
    log = logits.float().log_softmax(-1)
    return -(log.exp() * log).sum(-1)


def divergence(logits: Tensor, expected: Tensor, temperature: float = 1.0) -> Tensor:
    """Return each row's Kullback-Leibler divergence from the expected distribution, float32.

    Both sides' logits are divided by `temperature`: above 1, what is unlikely counts for more.
    """
    own, theirs = ((side.float() / temperature).log_softmax(-1) for side in (logits, expected))
    return F.kl_div(own, theirs, reduction="none", log_target=True).sum(-1)


def cross_entropy(logits: Tensor, expected: Tensor) -> Tensor:
    """Return each row's cross-entropy with its class."""
    return F.cross_entropy(logits, expected.long(), reduction="none")


def squared_error(logits: Tensor, expected: Tensor) -> Tensor:
    """Return each row's squared error."""
    wanted = expected if expected.ndim == 1 else expected[:, 0]
    return (logits[:, 0] - wanted.float()).square()
