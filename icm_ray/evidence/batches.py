"""Batches through a model: hidden states, and their mean over each example's tokens."""

import inspect
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icm_ray.evidence.readers import (
    Batch,
    Reader,
    TextReader,
    batches_of,
    make_batches,
    pad_batch,
    to_device,
    tokenize,
)


def hidden_states(model: nn.Module, batch: Batch) -> Float[Tensor, "examples tokens d_model"]:
    """Return the last hidden states; keys of earlier tokens, which serve nobody, are not kept."""
    inputs: dict = to_device(batch.inputs, model)
    if "use_cache" in inspect.signature(model.forward).parameters:
        inputs["use_cache"] = False
    return model(**inputs).last_hidden_state


def pooled(model: nn.Module, batch: Batch) -> Float[Tensor, "examples d_model"]:
    """Return the last hidden state averaged over each example's real tokens."""
    hidden = hidden_states(model, batch)
    mask = batch.mask.to(hidden.device)[..., None].to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def features(model: nn.Module, batches: Sequence[Batch]) -> Float[Tensor, "examples d_model"]:
    """Return pooled features of every example in its original order, float32 on CPU."""
    return in_order(batches, [pooled(model, batch).float().cpu() for batch in batches])


def in_order(batches: Sequence[Batch], parts: Sequence[Tensor]) -> Tensor:
    """Return what was computed batch by batch in the examples' original order."""
    rows = torch.cat([batch.rows for batch in batches])
    result = torch.empty(len(rows), *parts[0].shape[1:], dtype=parts[0].dtype)
    result[rows] = torch.cat(list(parts))
    return result


__all__ = [
    "Batch",
    "Reader",
    "TextReader",
    "batches_of",
    "features",
    "hidden_states",
    "in_order",
    "make_batches",
    "pad_batch",
    "pooled",
    "tokenize",
]
