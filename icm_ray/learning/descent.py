"""The driver's half of a step: add up the tasks' gradients and move the parameters."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from icm_ray.checkpoint import Checkpoint
from icm_ray.config import OptimisationSpec
from icm_ray.errors import InputError, RecipeError
from icm_ray.learning.gradients import Share
from icm_ray.learning.targets import UNREACHED

STATE = "learning.safetensors"


class Descent:
    """Parameters, optimiser and history of one run; everything a resume needs."""

    def __init__(self, leaves: Mapping[str, Tensor], how: OptimisationSpec) -> None:
        """Start at the leaves' present values; they are moved in place."""
        self.how = how
        self.leaves = dict(sorted(leaves.items()))
        kind = torch.optim.AdamW if how.optimizer == "adamw" else torch.optim.Adam
        self.optimizer = kind(
            list(self.leaves.values()),
            lr=how.lr,
            weight_decay=how.weight_decay,
            foreach=False,
        )
        self.history: list[dict[str, float]] = []

    @property
    def step(self) -> int:
        """Number of steps done."""
        return len(self.history)

    @property
    def unmoved(self) -> list[str]:
        """Names of the parameters that no loss has depended on so far."""
        return [name for name, leaf in self.leaves.items() if leaf not in self.optimizer.state]

    def values(self) -> dict[str, Tensor]:
        """Return the parameters' present values, to send to workers."""
        return {name: leaf.detach() for name, leaf in self.leaves.items()}

    def move(self, shares: Sequence[Share]) -> None:
        """Make one step from all tasks' shares.

        They are added in the order of their tasks' names in float64, so the sum does not depend on
        who made them or on when they came.

        Raises:
            RecipeError: a loss is no number; the parameters stay where they are.
            InputError: no loss depends on any parameter.
        """
        in_order = sorted(shares, key=lambda share: min(share.losses))
        losses = {task: loss for share in in_order for task, loss in share.losses.items()}
        self._refuse_lost(losses)
        if not any(share.gradients for share in in_order):
            raise InputError(UNREACHED)
        factors = self._factors(losses)
        for name, leaf in self.leaves.items():
            parts = [
                factors[min(share.losses)] * share.gradients[name].double().to(leaf.device)
                for share in in_order
                if name in share.gradients
            ]
            # No gradient at all, unlike a zero one, leaves the parameter out of the decay too.
            leaf.grad = torch.stack(parts).sum(0).to(leaf.dtype) if parts else None
        for group in self.optimizer.param_groups:
            group["lr"] = self.how.rate(self.step)
        self.optimizer.step()
        self.history.append(dict(sorted(losses.items())))

    def _refuse_lost(self, losses: Mapping[str, float]) -> None:
        lost = sorted(task for task, loss in losses.items() if not math.isfinite(loss))
        if lost:
            raise RecipeError(
                f"learn: the loss of {', '.join(lost)} is no number at step {self.step}. Lower "
                "learn.optimisation.lr, or check the adapters' and the base's largest values."
            )

    def _factors(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Return the smooth maximum's weight of each task, 1 on average."""
        if self.how.worst is None:
            return dict.fromkeys(losses, 1.0)
        values = torch.tensor(list(losses.values()), dtype=torch.float64)
        shares = (values / self.how.worst).softmax(0) * len(losses)
        return dict(zip(losses, shares.tolist(), strict=True))

    def save(self, checkpoint: Checkpoint) -> None:
        """Write the state."""
        checkpoint.save(self.leaves, self.optimizer, self.history)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a saved state of the same run, if there is one."""
        self.history = checkpoint.load(self.leaves, self.optimizer)
