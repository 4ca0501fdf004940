"""A merge's arithmetic without what a merge does around it: no checks, norms or hashes."""

from collections.abc import Iterator, Sequence

import torch

from icm_ray.benchmarks.peers import Found
from icm_ray.merging.cut import cut
from icm_ray.merging.inputs import inputs_of
from icm_ray.merging.order import MergeOrder
from icm_ray.merging.passes import with_statistics
from icm_ray.methods import METHODS
from icm_ray.types import Adapter, Delta, LoRAFactors, PerTask


def cut_of(order: MergeOrder, adapters: Sequence[Adapter]) -> Found:
    """Return what our method makes of every layer, cut to the order's rank, as factors."""
    found: Found = {}
    for layer, result in _results(order, adapters):
        factors = cut(result, order.rule).factors
        found[layer] = (factors.b, factors.a)
    return found


def dense_of(order: MergeOrder, adapters: Sequence[Adapter]) -> Found:
    """Return what our method makes of every layer, before any cut, as a matrix."""
    found: Found = {}
    for layer, result in _results(order, adapters):
        found[layer] = result.dense() if isinstance(result, Delta) else result.delta()
    return found


def _results(
    order: MergeOrder, adapters: Sequence[Adapter]
) -> Iterator[tuple[str, LoRAFactors | Delta]]:
    """Yield every layer and what the method itself makes of it."""
    by_name = {adapter.name: adapter for adapter in adapters}

    def read(task: str, layer: str) -> LoRAFactors:
        return by_name[task].modules[layer]

    with torch.no_grad():
        complete = with_statistics(order, read)
        for layer in order.present:
            factors, context, extra = inputs_of(complete, layer, read, with_norms=False)
            params = order.params_at(layer)
            result = METHODS[order.method].function(factors, context=context, **extra, **params)
            yield layer, result.unified if isinstance(result, PerTask) else result
