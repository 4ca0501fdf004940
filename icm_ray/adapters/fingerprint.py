"""What makes two adapters the same: a hash of their factors; and how large a change is."""

import hashlib
import json
from collections.abc import Mapping

import torch
from torch import Tensor

from icm_ray.types import LoRAFactors


def fingerprint_of(modules: Mapping[str, LoRAFactors]) -> str:
    """Return the sha256 over module paths, shapes and little-endian float32 factors.

    Modules of rank 0 do not count: they change nothing and no file can hold them.
    """
    digest = hashlib.sha256()
    for module, factors in sorted(modules.items()):
        if factors.rank:
            add_to_digest(digest, module, factors)
    return digest.hexdigest()


def inner_products(factors: LoRAFactors) -> tuple[Tensor, Tensor]:
    """Return those of the columns of b and of the rows of a, `(rank, rank)` each."""
    return factors.b.T @ factors.b, factors.a @ factors.a.T


def squared_norm(factors: LoRAFactors) -> float:
    """Return the squared Frobenius norm of `b @ a`. Cost: (d_out + d_in) * rank^2."""
    return squared_norm_of(*inner_products(factors))


def squared_norm_of(left: Tensor, right: Tensor) -> float:
    """Return the squared norm of the product whose factors have these inner products."""
    return max(float((left.double() * right.double()).sum()), 0.0)


def largest(values: Tensor) -> float:
    """Return the largest absolute value; NaN if there is a NaN. Much faster than `isfinite`."""
    low, high = torch.aminmax(values)
    return max(-float(low), float(high))


def add_to_digest(digest: "hashlib._Hash", module: str, factors: LoRAFactors) -> None:
    """Add one module of `fingerprint_of`, for callers who hold one module at a time."""
    digest.update(json.dumps([module, *factors.shape, factors.rank]).encode())
    digest.update(_little_endian(factors.a))
    digest.update(_little_endian(factors.b))


def _little_endian(values: Tensor) -> memoryview:
    plain = values.detach().to("cpu", torch.float32).contiguous().numpy()
    return plain.astype("<f4", copy=False).data
