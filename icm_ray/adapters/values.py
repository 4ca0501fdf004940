"""One look at all values of an adapter: its norm, what is odd about them, and its fingerprint."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from icm_ray.adapters.fingerprint import (
    add_to_digest,
    inner_products,
    largest,
    squared_norm_of,
)
from icm_ray.errors import InputError, by_cause
from icm_ray.types import LoRAFactors

HUGE = 1e18
"""Beyond this a squared entry leaves float32, so norms and cosines of the adapter do too."""


@dataclass(frozen=True)
class Scan:
    """What one pass over all values shows.

    Attributes:
        norm: Frobenius norm of all deltas together.
        warnings: What is finite but odd about the values.
        fingerprint: As `fingerprint_of` gives it; empty if nobody asked for it.
    """

    norm: float
    warnings: tuple[str, ...]
    fingerprint: str


def scan(
    file: Path,
    modules: Iterable[tuple[str, LoRAFactors, tuple[str, str]]],
    saved: Iterable[tuple[str, Tensor]],
    *,
    hashed: bool,
) -> Scan:
    """Look at every module and every full tensor once, holding one at a time.

    Args:
        file: The weights file, for messages.
        modules: Path, factors, and the names of a and b, in the file's order.
        saved: Full tensors that are carried along.
        hashed: Whether the fingerprint is wanted, which takes twice as long as all else.

    Raises:
        InputError: naming the tensors that hold NaN or infinity.
    """
    digest = hashlib.sha256()
    bad: list[str] = []
    zero: list[str] = []
    huge: list[str] = []
    squares, count = 0.0, 0
    for module, factors, keys in modules:
        count += 1
        if hashed:
            add_to_digest(digest, module, factors)
        products = inner_products(factors)
        squares += squared_norm_of(*products)
        # A sum of squares leaves few in doubt: single values are looked at in these alone.
        if all(0 < float(one.trace()) <= HUGE**2 for one in products):
            continue
        peaks = {key: largest(x) for key, x in zip(keys, (factors.a, factors.b), strict=True)}
        bad += broken(peaks)
        # alpha 0 is told on its own
        zero += [module] if 0 in peaks.values() and factors.scaling else []
        huge += [module] if max(peaks.values()) > HUGE else []
    bad += [key for key, tensor in saved if not torch.isfinite(tensor).all()]
    if bad:
        raise not_finite(file, bad)
    notes = [
        f"{file}: {paths[0]}: {what} in {len(paths)} of {count} modules."
        for paths, what in ((zero, "all-zero change"), (huge, f"values beyond {HUGE:.0e}"))
        if paths
    ]
    return Scan(squares**0.5, tuple(notes), digest.hexdigest() if hashed else "")


def broken(peaks: Mapping[str, float]) -> list[str]:
    """Return the tensors whose largest magnitude is NaN or infinite."""
    return [key for key, peak in peaks.items() if not math.isfinite(peak)]


def not_finite(file: Path, keys: Iterable[str]) -> InputError:
    """Return the error of tensors that hold NaN or infinity."""
    expected = "NaN or infinity but finite float32 values are expected. Train or export it again."
    return InputError(f"{file}: {line}" for line in by_cause((key, expected) for key in keys))
