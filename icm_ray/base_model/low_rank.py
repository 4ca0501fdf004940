"""Adapters applied to a base as low-rank updates on the fly; no weight is copied or changed."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icm_ray.base_model.loading import find_module
from icm_ray.base_model.placing import device_of
from icm_ray.errors import InputError
from icm_ray.types import Adapter, LoRAFactors


@contextlib.contextmanager
def applied(model: nn.Module, adapter: Adapter | None) -> Iterator[None]:
    """Run the body with `adapter` added to the model's modules; None leaves the base alone.

    Each adapted module's output gains `b (a x)`, which costs rank * (d_in + d_out) per token.

    Raises:
        InputError: a module is missing in the base or has another shape.
    """
    handles = []
    try:
        for path, factors in (adapter.modules if adapter else {}).items():
            module = find_module(model, path)
            _check_shape(path, module, factors)
            layout = adapter.layouts.get(path, "linear") if adapter else "linear"
            hook = _update(factors, layout, module, seat_of(module, model))
            handles.append(module.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


Seat = tuple[torch.device, torch.dtype]
"""Where a module computes, and in which precision."""


def seat_of(module: nn.Module, model: nn.Module) -> Seat:
    """Return where a module of a model computes, and how precisely."""
    plain = next(weight for weight in model.parameters() if weight.is_floating_point())
    return device_of(module), plain.dtype


def change_shape(module: nn.Module) -> tuple[int, int] | None:
    """Return the `(d_out, d_in)` of a change of a module; None if it has no weight matrix."""
    if hasattr(module, "in_features"):  # quantised layers keep their weights in other shapes
        return int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    weight = next(module.parameters(), None)
    if weight is None or weight.ndim < 2:
        return None
    d_out, d_in = weight.flatten(1).shape
    # GPT-2's Conv1D, which transformers defines, and embeddings store their weight transposed.
    is_turned = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
    return (d_in, d_out) if is_turned else (d_out, d_in)


def _update(
    factors: LoRAFactors, layout: str, module: Any, seat: Seat
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    a, b = factors.a.to(*seat), factors.b.to(*seat)

    def update(_module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        x = inputs[0].to(a.device)  # of a spread base it may come from the device before
        if layout == "embedding":
            return output + F.embedding(x, a.T) @ b.T
        if layout.startswith("conv"):
            kernel = a.reshape(a.shape[0], *module.weight.shape[1:])
            inside = module._conv_forward(x, kernel, None)  # with its own stride and padding
            # A 1x1 convolution after the kernel is a linear map over channels.
            return output + (inside.movedim(1, -1) @ b.T).movedim(-1, 1)
        return output + (x @ a.T) @ b.T

    return update


def _check_shape(path: str, module: nn.Module, factors: LoRAFactors) -> None:
    expected = change_shape(module)
    if expected is None:
        raise InputError(f"module {path}: has no weight matrix. The adapter is for another base.")
    if factors.shape != expected:
        raise InputError(
            f"module {path}: the base's change is {expected} but the adapter's delta is "
            f"{factors.shape}. The adapter belongs to another base."
        )
