"""Task heads: one linear map on pooled features, trained with its expert and then frozen."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from icm_ray.suites.tasks import Task


@dataclass(frozen=True)
class Head:
    """A frozen linear head.

    Attributes:
        weight: `(outputs, d_model)`.
        bias: `(outputs,)`.
        mean: Target mean of the training set; 0 for classification.
        std: Target standard deviation; a regression head predicts in units of it.
    """

    weight: Float[Tensor, "outputs d_model"]
    bias: Float[Tensor, " outputs"]
    mean: float = 0.0
    std: float = 1.0

    def predict(self, features: Float[Tensor, "*rows d_model"], task: Task) -> np.ndarray:
        """Return class indices or numbers, one a row, float64."""
        logits = features @ self.weight.T + self.bias
        if task.is_class:
            return logits.argmax(-1).numpy().astype(np.float64)
        return logits[..., 0].double().numpy() * self.std + self.mean

    def save(self, path: Path) -> None:
        """Write the head as safetensors."""
        scale = torch.tensor([self.mean, self.std], dtype=torch.float64)
        tensors = {"weight": self.weight, "bias": self.bias, "scale": scale}
        save_file({name: t.detach().contiguous() for name, t in tensors.items()}, path)

    @classmethod
    def load(cls, path: Path) -> "Head":
        """Read a head."""
        tensors = load_file(path)
        mean, std = tensors["scale"].tolist()
        return cls(tensors["weight"], tensors["bias"], mean, std)


def target_scale(task: Task, targets: np.ndarray) -> tuple[float, float]:
    """Return the mean and standard deviation a regression is trained in; (0, 1) otherwise."""
    if task.is_class:
        return 0.0, 1.0
    return float(targets.mean()), float(targets.std()) or 1.0


def loss(logits: Tensor, targets: Tensor, task: Task) -> Tensor:
    """Return cross-entropy, or the squared error of standardised targets."""
    targets = targets.to(logits.device)
    if task.is_class:
        return nn.functional.cross_entropy(logits, targets.long())
    return nn.functional.mse_loss(logits[:, 0], targets.float())
