"""Task heads: one linear map on pooled features, trained with its expert and then frozen."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from icm_ray.base_model.states import Pooling
from icm_ray.errors import InputError
from icm_ray.suites.tasks import Task

Bend = Literal["tanh", "relu"]
"""What stands between a dense layer and the map behind it."""


@dataclass(frozen=True)
class Head:
    """A frozen head: a linear map, perhaps behind a dense layer.

    Attributes:
        weight: `(outputs, d_model)`.
        bias: `(outputs,)`.
        mean: Target mean of the training set; 0 for classification.
        std: Target standard deviation; a regression head predicts in units of it.
        pooling: Which state it reads.
        dense: Weight and bias of a layer before it; None without one.
        bend: What stands between the two.
    """

    weight: Float[Tensor, "outputs d_model"]
    bias: Float[Tensor, " outputs"]
    mean: float = 0.0
    std: float = 1.0
    pooling: Pooling = "mean"
    dense: tuple[Tensor, Tensor] | None = None
    bend: Bend = "tanh"

    def logits(self, read: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows outputs"]:
        """Return what the head makes of states."""
        if self.dense is not None:
            weight, bias = (tensor.to(read) for tensor in self.dense)
            read = getattr(torch, self.bend)(read @ weight.T + bias)
        return read @ self.weight.T.to(read) + self.bias.to(read)

    def predict(self, features: Float[Tensor, "*rows d_model"], task: Task) -> np.ndarray:
        """Return class indices or numbers, one a row, float64."""
        logits = self.logits(features)
        if task.is_class:
            return logits.argmax(-1).numpy().astype(np.float64)
        return logits[..., 0].double().numpy() * self.std + self.mean

    @property
    def described(self) -> list[Any]:
        """Its numbers, and what else identifies it, as plain data."""
        plain = [self.weight.tolist(), self.bias.tolist(), self.mean, self.std]
        if self.dense is not None:
            plain += [self.bend, *(tensor.tolist() for tensor in self.dense)]
        return plain if self.pooling == "mean" else [*plain, self.pooling]

    def save(self, path: Path) -> None:
        """Write the head as safetensors."""
        scale = torch.tensor([self.mean, self.std], dtype=torch.float64)
        tensors = {"weight": self.weight, "bias": self.bias, "scale": scale}
        if self.dense is not None:
            tensors |= {"dense.weight": self.dense[0], "dense.bias": self.dense[1]}
        metadata = None if self.pooling == "mean" else {"pooling": self.pooling}
        if self.dense is not None:
            metadata = {"pooling": self.pooling, "bend": self.bend}
        plain = {name: t.detach().contiguous() for name, t in tensors.items()}
        save_file(plain, path, metadata=metadata)

    @classmethod
    def load(cls, path: Path) -> "Head":
        """Read a head.

        Raises:
            InputError: the file holds none.
        """
        try:
            with safe_open(path, "pt") as file:
                names, metadata = list(file.keys()), file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in names}
            mean, std = tensors["scale"].tolist() if "scale" in tensors else (0.0, 1.0)
            weight = tensors["weight"]
            dense = tensors.get("dense.weight"), tensors.get("dense.bias")
            pooling: Any = metadata.get("pooling", "mean")
            bend: Any = metadata.get("bend", "tanh")
            bias = tensors.get("bias", weight.new_zeros(len(weight)))
            if (
                pooling not in get_args(Pooling)
                or bend not in get_args(Bend)
                or weight.ndim != 2
                or bias.shape != weight.shape[:1]
            ):
                raise ValueError("a weight (outputs, width) and a bias are expected")
            whole = None if dense[0] is None or dense[1] is None else (dense[0], dense[1])
            return cls(weight, bias, mean, std, pooling, whole, bend)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(
                f"{path}: no head ({error}). Write it as jobs.finetune does."
            ) from None


def target_scale(task: Task, targets: np.ndarray) -> tuple[float, float]:
    """Return the mean and standard deviation a regression is trained in; (0, 1) otherwise."""
    if not task.kind.endswith("regression"):
        return 0.0, 1.0
    return float(targets.mean()), float(targets.std()) or 1.0


def loss(logits: Tensor, targets: Tensor, task: Task) -> Tensor:
    """Return cross-entropy, or the squared error of standardised targets."""
    targets = targets.to(logits.device)
    if task.is_class:
        return nn.functional.cross_entropy(logits, targets.long())
    return nn.functional.mse_loss(logits[:, 0], targets.float())
