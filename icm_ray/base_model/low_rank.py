"""Adapters applied to a base as low-rank updates on the fly; no weight is copied or changed."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from icm_ray.base_model.loading import find_module
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
            handles.append(module.register_forward_hook(_update(factors, layout, module)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _update(
    factors: LoRAFactors, layout: str, module: nn.Module
) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
    weight = next(module.parameters())
    a = factors.a.to(weight.device, weight.dtype)
    b = factors.b.to(weight.device, weight.dtype)
    if layout == "embedding":
        return lambda _module, inputs, output: output + F.embedding(inputs[0], a.T) @ b.T
    if layout.startswith("conv"):
        kernel = a.reshape(a.shape[0], *weight.shape[1:])
        convolve: Any = module._conv_forward  # with the module's own stride and padding
        # A 1x1 convolution after the kernel is a linear map over channels.
        return lambda _module, inputs, output: (
            output + (convolve(inputs[0], kernel, None).movedim(1, -1) @ b.T).movedim(-1, 1)
        )
    return lambda _module, inputs, output: output + (inputs[0] @ a.T) @ b.T


def _check_shape(path: str, module: nn.Module, factors: LoRAFactors) -> None:
    weight = next(module.parameters(), None)
    if weight is None or weight.ndim < 2:
        raise InputError(f"module {path}: has no weight matrix. The adapter is for another base.")
    expected = tuple(weight.flatten(1).shape)
    # GPT-2's Conv1D, which transformers defines, and embeddings store their weight transposed.
    if isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D":
        expected = expected[::-1]
    if factors.shape != expected:
        raise InputError(
            f"module {path}: the base's change is {expected} but the adapter's delta is "
            f"{factors.shape}. The adapter belongs to another base."
        )
