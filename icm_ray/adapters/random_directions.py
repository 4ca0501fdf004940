"""Random adapters in the place of real ones: the control of what their directions are worth."""

from dataclasses import replace

import torch
from torch import Generator

from icm_ray.adapters.fingerprint import fingerprint_of
from icm_ray.linalg import lowrank
from icm_ray.seeding import generator
from icm_ray.types import Adapter, LoRAFactors


def random_like(adapter: Adapter, seed: int) -> Adapter:
    """Return an adapter with the same modules and singular values, and random directions.

    So every module's shape, norm and spectrum are the adapter's; its rank is lower where the
    adapter's own factors are dependent. Full tensors are kept.

    Args:
        adapter: What is imitated.
        seed: Of the draw, with the adapter's name and each module's.
    """
    modules = {
        module: _scattered(factors, generator(seed, "random", adapter.name, module))
        for module, factors in adapter.modules.items()
    }
    return replace(adapter, modules=modules, fingerprint=fingerprint_of(modules))


def _scattered(factors: LoRAFactors, draw: Generator) -> LoRAFactors:
    values = lowrank.svd(factors.b, factors.a).s
    d_out, d_in = factors.shape
    left, right = (
        torch.linalg.qr(torch.randn(width, len(values), generator=draw, dtype=torch.float64))[0]
        for width in (d_out, d_in)
    )
    root = values.sqrt()  # shared by both, so that neither is too small for half precision
    return LoRAFactors((right * root).T.float().contiguous(), (left * root).float().contiguous())
