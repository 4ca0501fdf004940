"""Several adapters in one forward pass: each on its own task's rows, all in one batched product."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from icm_ray.base_model.readers import Batch, alike
from icm_ray.errors import RecipeError

MOST_PADDING = 1.1
"""Tokens of a pass over those of its batches: more would cost more time than sharing it saves."""


def passes(batches: Mapping[str, Batch]) -> list[dict[str, Batch]]:
    """Return which batches go through the base together: those of about one width, if it is one."""
    found = []
    for group in alike(batches):
        shared: dict[str, Batch] = {}
        for name in sorted(group, key=lambda name: group[name].mask.shape[1]):
            masks = [batch.mask for batch in (*shared.values(), group[name])]
            padded = masks[-1].shape[1] * sum(map(len, masks))
            if padded > MOST_PADDING * sum(mask.numel() for mask in masks):
                found.append(shared)
                shared = {}
            shared[name] = group[name]
        found.append(shared)
    return found


@contextlib.contextmanager
def routed(model: Any, names: Sequence[str], rows: int) -> Iterator[None]:
    """Run the body with each adapter added on its own, equal share of a batch's rows.

    Every adapted layer stacks the factors to `(tasks, rank, d_in)` and `(tasks, d_out, rank)` and
    multiplies them with all inputs at once. A model of a single adapter runs as PEFT runs it.

    Args:
        model: PEFT model whose adapters are alike, on linear layers.
        names: Adapters in the order of their rows.
        rows: Rows of the batch, all tasks together.

    Raises:
        RecipeError: a layer sees its inputs in another order than the batch's.
    """
    if len(model.peft_config) == 1:
        yield
        return
    from peft.tuners.lora import LoraLayer

    parts = model.named_modules()
    layers: dict[str, Any] = {path: part for path, part in parts if isinstance(part, LoraLayer)}
    try:
        for path, layer in layers.items():
            layer.forward = partial(_forward, layer, path, names, rows)
        yield
    finally:
        for layer in layers.values():
            vars(layer).pop("forward", None)  # the class's own shows again


def _forward(
    layer: Any, path: str, names: Sequence[str], rows: int, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    if len(x) != rows:
        raise RecipeError(
            f"training.tasks_per_forward: {path} sees {len(x)} rows of a batch of {rows}, so no "
            "row's task is known there. Set it to 1, or choose other lora.targets."
        )
    output = layer.base_layer(x, *args, **kwargs)
    a = torch.stack([layer.lora_A[name].weight for name in names])
    b = torch.stack([layer.lora_B[name].weight for name in names])
    own = x.to(a.dtype).reshape(len(names), -1, a.shape[2])
    start = output.to(a.dtype).reshape(len(names), -1, b.shape[1])
    changed = torch.baddbmm(start, own @ a.mT, b.mT, alpha=layer.scaling[names[0]])
    return changed.view(output.shape).to(output.dtype)
