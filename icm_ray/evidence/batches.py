"""Texts to token batches, the same ones whoever makes them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from icm_ray.errors import InputError
from icm_ray.evidence.base import to_device


@dataclass(frozen=True)
class Batch:
    """Padded token ids and where they came from.

    Attributes:
        ids: `(examples, tokens)` int64.
        mask: `(examples, tokens)` bool, False on padding.
        rows: Position of each example in the original order.
    """

    ids: Int[Tensor, "examples tokens"]
    mask: Bool[Tensor, "examples tokens"]
    rows: Int[Tensor, " examples"]


def tokenize(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> list[list[int]]:
    """Return the token ids of each text, special tokens included, cut to `max_tokens`.

    Raises:
        InputError: a text has no token, so there is no state to average over.
    """
    ids = tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
    empty = [row for row, tokens in enumerate(ids) if not tokens]
    if empty:
        raise InputError(f"texts: number {empty[0]} gives no token. Leave empty texts out.")
    return ids


def make_batches(ids: Sequence[Sequence[int]], size: int, pad: int | None) -> list[Batch]:
    """Return batches of examples of similar length.

    Sorting by length removes most padding; ties keep their order, so the batches are a function
    of the texts alone.
    """
    order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
    return [
        pad_batch(
            [ids[row] for row in order[start : start + size]], order[start : start + size], pad
        )
        for start in range(0, len(order), size)
    ]


def pad_batch(ids: Sequence[Sequence[int]], rows: Sequence[int], pad: int | None) -> Batch:
    """Return one batch padded on the right to its longest example.

    GPT-2 and Llama have no padding token (None); any will do, since the mask covers it.
    """
    width = max(len(row) for row in ids)
    padded = torch.tensor([[*row, *[pad or 0] * (width - len(row))] for row in ids])
    lengths = torch.tensor([len(row) for row in ids])
    return Batch(padded, torch.arange(width)[None] < lengths[:, None], torch.tensor(rows))


def pooled(model: nn.Module, batch: Batch) -> Float[Tensor, "examples d_model"]:
    """Return the last hidden state averaged over each example's real tokens."""
    inputs = to_device({"input_ids": batch.ids, "attention_mask": batch.mask.long()}, model)
    hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None].to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def features(model: nn.Module, batches: Sequence[Batch]) -> Float[Tensor, "examples d_model"]:
    """Return pooled features of every example in its original order, float32 on CPU."""
    parts = [pooled(model, batch).float().cpu() for batch in batches]
    rows = torch.cat([batch.rows for batch in batches])
    result = torch.empty(len(rows), parts[0].shape[1])
    result[rows] = torch.cat(parts)
    return result
