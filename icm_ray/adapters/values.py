"""One look at all values of an adapter: its fingerprint, its norm, and what is odd about them."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from icm_ray.adapters.fingerprint import add_to_digest, squared_norm
from icm_ray.errors import InputError, by_cause
from icm_ray.types import LoRAFactors

HUGE = 1e18
"""Beyond this a squared entry leaves float32, so norms and cosines of the adapter do too."""


@dataclass(frozen=True)
class Scan:
    """What one pass over all values shows.

    Attributes:
        fingerprint: As `fingerprint_of` gives it.
        norm: Frobenius norm of all deltas together.
        warnings: What is finite but odd about the values.
    """

    fingerprint: str
    norm: float
    warnings: tuple[str, ...]


def scan(
    file: Path,
    modules: Iterable[tuple[str, LoRAFactors, Mapping[str, float]]],
    saved: Iterable[tuple[str, Tensor]],
) -> Scan:
    """Look at every module and every full tensor once, holding one at a time.

    Args:
        file: The weights file, for messages.
        modules: Path, factors, and each tensor's largest magnitude, in the file's order.
        saved: Full tensors that are carried along.

    Raises:
        InputError: naming the tensors that hold NaN or infinity.
    """
    digest = hashlib.sha256()
    bad: list[str] = []
    zero: list[str] = []
    huge: list[str] = []
    squares, count = 0.0, 0
    for module, factors, peaks in modules:
        count += 1
        bad += broken(peaks)
        add_to_digest(digest, module, factors)
        squares += squared_norm(factors)
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
    return Scan(digest.hexdigest(), squares**0.5, tuple(notes))


def broken(peaks: Mapping[str, float]) -> list[str]:
    """Return the tensors whose largest magnitude is NaN or infinite."""
    return [key for key, peak in peaks.items() if not math.isfinite(peak)]


def not_finite(file: Path, keys: Iterable[str]) -> InputError:
    """Return the error of tensors that hold NaN or infinity."""
    expected = "NaN or infinity but finite float32 values are expected. Train or export it again."
    return InputError(f"{file}: {line}" for line in by_cause((key, expected) for key in keys))
