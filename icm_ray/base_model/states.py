"""Batches through a model: hidden states, and their mean over each example's tokens."""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from icm_ray.base_model.readers import (
    Batch,
    Reader,
    TextReader,
    batches_of,
    join,
    make_batches,
    pad_batch,
    shares,
    to_device,
    tokenize,
)

Pooling = Literal["mean", "first", "last", "own"]
"""Which state of an example a head reads: the mean over its tokens, the first or last token's, or
the one that a classifier of the model's own class reads."""

POOLERS = ("bert", "albert")
"""Kinds of models whose classifiers read what their pooler makes of the first token; those of
others read the first token's state itself."""


def hidden_states(model: nn.Module, batch: Batch) -> Float[Tensor, "examples tokens d_model"]:
    """Return the last hidden states; keys of earlier tokens, which serve nobody, are not kept.

    A decoder behind an encoder repeats the text, so its states stand for the same tokens. Where
    texts and images have a tower each (CLIP), the states are those of the batch's kind, or of
    the texts if it has both.
    """
    return outputs(model, batch)[0]


def outputs(
    model: nn.Module, batch: Batch
) -> tuple[Float[Tensor, "examples tokens d_model"], Float[Tensor, "examples d_model"] | None]:
    """Return the last hidden states, and what a classifier of the model's own class reads."""
    inputs: dict = to_device(batch.inputs, model)
    if hasattr(model, "text_model") and hasattr(model, "vision_model"):
        if "input_ids" in inputs and "pixel_values" in inputs:
            return model(**inputs).text_model_output.last_hidden_state, None
        tower: Any = model.text_model if "input_ids" in inputs else model.vision_model
        return tower(**inputs).last_hidden_state, None
    accepted = inspect.signature(model.forward).parameters
    if {"use_cache", "past_key_values"} & set(accepted):  # some take the former unnamed
        inputs["use_cache"] = False
    if "decoder_input_ids" in accepted:
        inputs["decoder_input_ids"] = _delayed(inputs["input_ids"], model.config)
    seen = model(**inputs)
    hidden = seen.last_hidden_state
    kind: Any = model.config
    return hidden, seen.pooler_output if kind.model_type in POOLERS else hidden[:, 0]


@dataclass(frozen=True)
class States:
    """What a model made of a batch.

    Attributes:
        batch: What it read.
        hidden: Its last hidden states.
        summary: What a classifier of the model's own class reads.
    """

    batch: Batch
    hidden: Float[Tensor, "examples tokens d_model"]
    summary: Float[Tensor, "examples d_model"] | None

    def pooled(self, how: Pooling = "mean") -> Float[Tensor, "examples d_model"]:
        """Return the state of each example that a head reads."""
        return pool(self.hidden, self.summary, self.batch.mask, how)


def states_of(model: nn.Module, batches: Sequence[Batch]) -> list[States]:
    """Return the states of each of some batches, of one pass over all of them."""
    hidden, summary = outputs(model, join(batches))
    summaries = [None] * len(batches) if summary is None else shares(summary, batches)
    return [
        States(batch, own, read)
        for batch, own, read in zip(batches, shares(hidden, batches), summaries, strict=True)
    ]


def _delayed(ids: Int[Tensor, "examples tokens"], config: Any) -> Int[Tensor, "examples tokens"]:
    """Return what a decoder reads to say `ids`: its start token, and then all but the last."""
    text = config.get_text_config()
    start = getattr(text, "decoder_start_token_id", None)
    start = text.pad_token_id if start is None else start
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], 1)


def pooled(
    model: nn.Module, batch: Batch, how: Pooling = "mean"
) -> Float[Tensor, "examples d_model"]:
    """Return the state of each example that a head reads."""
    return states_of(model, [batch])[0].pooled(how)


def pool(
    hidden: Float[Tensor, "examples tokens d_model"],
    summary: Float[Tensor, "examples d_model"] | None,
    mask: Bool[Tensor, "examples tokens"],
    how: Pooling = "mean",
) -> Float[Tensor, "examples d_model"]:
    """Return the state of each example that a head reads, of what a model's `outputs` are."""
    if how == "own":
        assert summary is not None, "no head of a model of two towers reads one"
        return summary
    if how == "first":
        return hidden[:, 0]
    mask = mask.to(hidden.device)
    if how == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
    weights = mask[..., None].to(hidden.dtype)
    return (hidden * weights).sum(1) / weights.sum(1)


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
    "Pooling",
    "Reader",
    "States",
    "TextReader",
    "batches_of",
    "features",
    "hidden_states",
    "in_order",
    "make_batches",
    "outputs",
    "pad_batch",
    "pool",
    "pooled",
    "states_of",
    "tokenize",
]
