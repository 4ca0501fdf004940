"""The driver's half of a step: add up the tasks' gradients and move the parameters."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from icm_ray.learning.gradients import Part

STATE = "learning.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Optimisation:
    """How the parameters move.

    Attributes:
        steps: Number of steps.
        lr: Learning rate at the start.
        optimizer: "adamw" (decoupled decay) or "adam".
        weight_decay: Decay; parameters without a gradient do not decay.
        schedule: How the rate falls over the steps.
        reduction: Mean of the tasks' losses, or their sum.
        worst: Temperature of a smooth maximum over tasks in place of the mean: the smaller, the
            more the worst task counts. None takes the mean.
        weights: Multiplies each task's loss; None takes 1.
    """

    steps: int
    lr: float
    optimizer: Literal["adamw", "adam"] = "adamw"
    weight_decay: float = 0.01
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    reduction: Literal["mean", "sum"] = "mean"
    worst: float | None = None
    weights: Mapping[str, float] | None = None

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        done = step / self.steps
        if self.schedule == "linear":
            return self.lr * (1 - done)
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * done)) / 2
        return self.lr

    def task_weights(self, tasks: Sequence[str]) -> dict[str, float]:
        """Return what each task's loss is multiplied by."""
        share = 1 / len(tasks) if self.reduction == "mean" else 1.0
        return {task: share * (self.weights or {}).get(task, 1.0) for task in tasks}


class Descent:
    """Parameters, optimiser and history of one run; everything a resume needs."""

    def __init__(self, leaves: Mapping[str, Tensor], options: Optimisation) -> None:
        """Start at the leaves' present values; they are moved in place."""
        self.options = options
        self.leaves = dict(sorted(leaves.items()))
        kind = torch.optim.AdamW if options.optimizer == "adamw" else torch.optim.Adam
        self.optimizer = kind(
            list(self.leaves.values()),
            lr=options.lr,
            weight_decay=options.weight_decay,
            foreach=False,
        )
        self.history: list[dict[str, float]] = []
        self.moved: set[str] = set()

    @property
    def step(self) -> int:
        """Number of steps done."""
        return len(self.history)

    def values(self) -> dict[str, Tensor]:
        """Return the parameters' present values, to send to workers."""
        return {name: leaf.detach() for name, leaf in self.leaves.items()}

    def move(self, parts: Sequence[Part]) -> None:
        """Make one step from all tasks' parts.

        The parts are added in the order of their tasks' names in float64, so the sum does not
        depend on who made them or on when they came.
        """
        in_order = sorted(parts, key=lambda part: min(part.losses))
        losses = {task: loss for part in in_order for task, loss in part.losses.items()}
        factors = self._factors(losses)
        for name, leaf in self.leaves.items():
            found = [
                factors[min(part.losses)] * part.gradients[name].double().to(leaf.device)
                for part in in_order
                if name in part.gradients
            ]
            # No gradient at all, unlike a zero one, leaves the parameter out of the decay too.
            leaf.grad = torch.stack(found).sum(0).to(leaf.dtype) if found else None
            self.moved |= {name} if found else set()
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.rate(self.step)
        self.optimizer.step()
        self.history.append(dict(sorted(losses.items())))

    def _factors(self, losses: Mapping[str, float]) -> dict[str, float]:
        """Return the smooth maximum's weight of each task, 1 on average."""
        if self.options.worst is None:
            return dict.fromkeys(losses, 1.0)
        values = torch.tensor(list(losses.values()), dtype=torch.float64)
        shares = (values / self.options.worst).softmax(0) * len(losses)
        return dict(zip(losses, shares.tolist(), strict=True))

    def save(self, folder: Path, key: str) -> None:
        """Write the state, replacing an earlier one whole.

        Args:
            folder: Exists already.
            key: Identifies the run; only a run with the same key resumes from it.
        """
        tensors: dict[str, Tensor] = {}
        for name, leaf in self.leaves.items():
            tensors[f"value/{name}"] = leaf.detach().cpu().contiguous()
            for moment in MOMENTS if name in self.moved else ():
                tensors[f"{moment}/{name}"] = self.optimizer.state[leaf][moment].cpu()
        temporary = folder / f".{STATE}.tmp"
        notes = {"key": key, "history": json.dumps(self.history)}
        save_file(tensors, temporary, metadata=notes)
        temporary.replace(folder / STATE)

    def resume(self, folder: Path, key: str) -> None:
        """Continue from a saved state of the same run, if there is one."""
        path = folder / STATE
        if not path.is_file():
            return
        try:
            with safe_open(path, framework="pt") as file:
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                notes = file.metadata()
            history = json.loads(notes["history"])
            values = {name: stored[f"value/{name}"] for name in self.leaves}
        except (SafetensorError, KeyError, TypeError, ValueError):
            path.unlink()  # cut off by a full disk, or not ours; the steps are simply made again
            return
        if notes["key"] != key:
            return
        self.history = history
        for name, leaf in self.leaves.items():
            leaf.data.copy_(values[name])
            if f"exp_avg/{name}" in stored:
                self.moved.add(name)
                self.optimizer.state[leaf] = {m: stored[f"{m}/{name}"] for m in MOMENTS}
