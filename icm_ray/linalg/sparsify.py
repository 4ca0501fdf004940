"""Which entries of a tensor are kept: by magnitude, exactly, or by chance."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt32
from torch import Tensor

from icm_ray.linalg import kernels

WORD = 2**32 - 1
"""Keeps the lower 32 bits, which products of int64 have right whatever overflows above them."""


def threshold(values: Float[Tensor, "..."], density: float) -> float:
    """Return the magnitude that the largest `density` of the entries reach.

    The rule of TIES (arXiv 2306.01708): with n entries and `k = n - int(n * density)`, the k-th
    smallest magnitude; 0 where k is 0. `values.abs() >= threshold` keeps at least
    `int(n * density)` entries, and all that are equal to the last one.

    Args:
        values: Any shape, float32.
        density: Share of entries to keep, in [0, 1].
    """
    k = values.numel() - int(values.numel() * density)
    return float(values.abs().flatten().kthvalue(k).values) if k > 0 else 0.0


def largest(values: Float[Tensor, "..."], count: int) -> Bool[Tensor, "..."]:
    """Return the mask of exactly `count` entries of largest magnitude; of equal ones the first.

    `torch.topk` picks any of equal entries; the first ones make the result repeatable.
    """
    magnitudes = values.abs().flatten()
    if count >= magnitudes.numel():
        return torch.ones_like(values, dtype=torch.bool)
    if count <= 0:
        return torch.zeros_like(values, dtype=torch.bool)
    last = magnitudes.kthvalue(magnitudes.numel() - count + 1).values
    mask, equal = magnitudes > last, magnitudes == last
    missing = count - int(mask.sum())
    mask |= equal & (equal.cumsum(0) <= missing)
    return mask.view(values.shape)


def row_keys(seed: int, rows: int) -> UInt32[np.ndarray, "rows 2"]:
    """Return what makes the draws of each row; a row's draws depend on nothing else."""
    return np.random.Philox(seed).random_raw(rows).view(np.uint32).reshape(rows, 2)


def draws(keys: UInt32[np.ndarray, "rows 2"], d_in: int) -> UInt32[np.ndarray, "rows d_in"]:
    """Return one uniform whole number in [0, 2**32) an entry.

    A hash of row key and column in place of a generator's stream: any block of rows can be drawn
    alone, in any order, and a compiled loop draws where it uses.
    """
    first, second, third = kernels.MIX
    x = np.arange(d_in, dtype=np.uint32) * first + keys[:, :1]
    half = x >> 16
    x ^= half
    x *= second
    x ^= np.right_shift(x, 15, out=half)
    x ^= keys[:, 1:]
    x *= third
    x ^= np.right_shift(x, 16, out=half)
    return x


def draws_on(
    device: torch.device, keys: UInt32[np.ndarray, "rows 2"], d_in: int
) -> Int[Tensor, "rows d_in"]:
    """Return the whole numbers of `draws` as int64 on a device, which has no unsigned ones."""
    if device.type == "cpu":
        return torch.from_numpy(draws(keys, d_in).astype(np.int64))
    first, second, third = kernels.MIX.tolist()
    key = torch.from_numpy(keys.astype(np.int64)).to(device)
    x = (torch.arange(d_in, device=device) * first + key[:, :1]) & WORD
    x = ((x ^ (x >> 16)) * second) & WORD
    x = ((x ^ (x >> 15) ^ key[:, 1:]) * third) & WORD
    return x ^ (x >> 16)


def drop(
    values: Float[Tensor, "rows d_in"],
    keys: UInt32[np.ndarray, "rows 2"],
    density: float,
    factor: float,
) -> None:
    """Multiply each entry by `factor` with probability `density`, else by 0, in place.

    Args:
        values: Consecutive rows, contiguous, float32.
        keys: Theirs, of `row_keys`.
        density: In (0, 1); exact to 2**-33.
        factor: 1 / density keeps the expected value.
    """
    bound = np.uint32(min(round(density * 2**32), 2**32 - 1))
    loop = kernels.loop_for(values, kernels.drop)
    if loop is not None:
        loop(values.numpy(), keys, bound, np.float32(factor))
        return
    if values.device.type != "cpu":
        kept = draws_on(values.device, keys, values.shape[1]) < int(bound)
        values.mul_(factor).mul_(kept)
        return
    kept = draws(keys, values.shape[1]) < bound
    values *= factor
    entries = values.numpy()
    np.multiply(entries, kept, out=entries)


def drop_by_rank(
    values: Float[Tensor, "rows d_in"],
    keys: UInt32[np.ndarray, "rows 2"],
    density: float,
    spread: float,
) -> None:
    """Keep each entry with a probability that falls with its rank in its row, in place.

    The entry of rank r (0 is the largest magnitude) of n is kept with probability
    `density + spread * (1/2 - r / n)`, at most 1, and divided by it.
    """
    n = values.shape[1]
    chances = (density + spread * (0.5 - torch.arange(n) / n)).clamp(max=1)
    ranking = values.abs().argsort(dim=1, descending=True, stable=True)
    chance = torch.empty_like(values).scatter_(1, ranking, chances.expand_as(values))
    uniform = (draws_on(values.device, keys, n) >> 8).float() * 2**-24
    values.div_(chance).masked_fill_(uniform >= chance, 0.0)
