"""Model breadcrumbs: neither the smallest nor the very largest entries, added up."""

from collections.abc import Iterator, Sequence
from typing import Annotated

from pydantic import Field
from torch import Tensor

from icm_ray.methods.shared.blocks import Density, added, deltas
from icm_ray.methods.shared.parameters import Scale, Weights, task_weights, usual
from icm_ray.methods.shared.trim import exactly
from icm_ray.types import Delta, LoRAFactors, ModuleContext


def breadcrumbs(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    density: Density = 0.14,
    gamma: Annotated[
        float,
        Field(ge=0, lt=1, description="Share of the largest entries to leave out first."),
        usual("uniform(0, 0.1)"),
    ] = 0.01,
    scale: Scale = 1.0,
    weights: Weights = None,
) -> Delta:
    """Add up the middle of each delta: `scale * sum_k w_k middle(delta_k)`.

    Paper: arXiv 2312.06795, section 3; `middle` leaves out the `int(gamma * n)` entries of largest
    magnitude of a module and keeps the `int(density * n)` next ones, so its beta is
    `1 - density - gamma`. Weights are 1 unless given. Where the two shares are more than
    everything, fewer of the largest are left out.
    """
    factors = list(factors)

    def outliers(size: int) -> int:
        return min(int(gamma * size), size - int(density * size))

    def with_outliers(size: int) -> int:
        return int(density * size) + outliers(size)

    outer = exactly(lambda: deltas(factors), len(factors), with_outliers)
    inner = exactly(lambda: deltas(factors), len(factors), outliers)

    def blocks() -> Iterator[Tensor]:
        pairs = zip(outer.of(deltas(factors)), inner.of(deltas(factors)), strict=True)
        return (kept.sub_(largest) for kept, largest in pairs)

    numbers = task_weights(context, weights, default=1.0)
    return added(blocks, factors[0].shape, [scale * number for number in numbers])
