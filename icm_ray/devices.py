"""Where tensors are computed on: the one way by which they get there and come back."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from icm_ray.errors import RecipeError

CPU = torch.device("cpu")


def find_device(name: str) -> torch.device:
    """Return a device by its name in a recipe.

    Args:
        name: "cpu", "cuda" or "cuda:1".

    Raises:
        RecipeError: this process has no such device.
    """
    device = torch.device(name)
    if device.type != "cuda":
        return device
    count, index = torch.cuda.device_count(), device.index or 0
    if index >= count:
        raise RecipeError(
            f"resources.device: {name} but torch sees {count} CUDA devices here. Choose cpu, or a "
            "machine and a build of torch with CUDA."
        )
    return torch.device("cuda", index)


@contextlib.contextmanager
def made_on(device: torch.device) -> Iterator[None]:
    """Let tensors that the body makes without naming a device be made on this one."""
    if device.type == "cpu":  # torch's own default, at no cost a call
        yield
        return
    with device:
        yield


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors of one shape as one, on the first one's device; they may be on several."""
    return torch.stack([part.to(parts[0].device) for part in parts])


def to_cpu(tensor: Tensor) -> Tensor:
    """Return a tensor in the processor's memory; itself if it is there."""
    return tensor if tensor.device.type == "cpu" else tensor.cpu()
