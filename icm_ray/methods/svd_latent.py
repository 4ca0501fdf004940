"""SVD in the latent state: average the adapters inside their own principal components."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from icm_ray.linalg.gram import inner_products
from icm_ray.linalg.lowrank import svd
from icm_ray.methods.linear import sum_of_factors
from icm_ray.methods.shared.weighted_sum import weighted_sum
from icm_ray.methods.table import Pass
from icm_ray.types import Delta, LoRAFactors, ModuleContext

Components = Annotated[
    int | None,
    Field(ge=1, description="Principal components that are kept; None: half the tasks."),
]
Space = Annotated[
    Literal["factors", "delta"],
    Field(description="What is flattened: canonical A and B, or the deltas (exact sums)."),
]


def svd_latent(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    components: Components = None,
    space: Space = "factors",
) -> LoRAFactors | Delta:
    """Average in the span of the first principal components: `sum_k c_k x_k`, `c = P 1/K`.

    `x_k` is adapter k flattened, all modules in one vector; P projects on the first `components`
    eigenvectors of the Gram matrix of the x, so that keeping all of them gives the plain mean. In
    `space="factors"` x holds A and B in a canonical gauge (`delta = U S V`, `B = U sqrt(S)`,
    `A = sqrt(S) V`, the largest entry of each row of V positive, ranks matched by size, missing
    ones zero); the result multiplies the two sums. In `space="delta"` x holds the deltas.

    Paper: ICM-Fusion, arXiv 2508.04153, compares with "SVD in latent state" and does not define it;
    this is our reading: principal components without centring, the linear counterpart of its
    variational autoencoder, which also works on factors. Hence the default space.

    Where singular values of a delta are equal, its canonical gauge is arbitrary, as is the last
    component where eigenvalues of the Gram matrix are; the result is then one of several.

    Cost: one pass over all modules for the Gram matrix, O(R^2 (d_out + d_in)) each.
    """
    coefficients = context.statistics["coefficients"][context.rows].tolist()
    if space == "delta":
        return weighted_sum(factors, coefficients)
    return sum_of_factors([_canonical(f) for f in factors], coefficients, coefficients)


def passes(**_params: Any) -> tuple[Pass, ...]:
    """Return the one pass that adds up the Gram matrix of the flattened adapters."""
    return (Pass(_measure, _conclude),)


def _measure(
    factors: Sequence[LoRAFactors], *, context: ModuleContext, space: Space, **_params: Any
) -> Mapping[str, Tensor]:
    if space == "delta":
        products = inner_products([(f.b, f.a) for f in factors])
    else:
        products = _factor_products([_canonical(f) for f in factors])
    tasks = len(context.all_tasks)
    gram = torch.zeros(tasks, tasks, dtype=torch.float64)
    rows = torch.tensor(context.rows)
    gram[rows[:, None], rows] = products
    return {"gram": gram}


def _conclude(
    total: Mapping[str, Tensor], *, tasks: Sequence[str], components: Components, **_params: Any
) -> Mapping[str, Tensor]:
    kept = components or (len(tasks) + 1) // 2
    _, vectors = torch.linalg.eigh(total["gram"])
    first = vectors[:, -kept:]
    return {"coefficients": first @ first.mean(0)}


def _canonical(factors: LoRAFactors) -> LoRAFactors:
    """Return the same delta split in the one way that does not depend on how it came."""
    spectrum = svd(factors.b, factors.a)
    b, a = spectrum.factors(spectrum.s.numel())
    if len(a) == 0:
        return LoRAFactors(a, b)
    signs = a.gather(1, a.abs().argmax(1, keepdim=True)).sign()
    return LoRAFactors(a * signs, b * signs.T)


def _factor_products(factors: Sequence[LoRAFactors]) -> Float[Tensor, "tasks tasks"]:
    """Return the inner products of A plus those of B, rank by rank, smaller ranks ending in 0."""
    gram = torch.zeros(len(factors), len(factors), dtype=torch.float64)
    for rank in range(max(f.rank for f in factors)):
        tall = [i for i, f in enumerate(factors) if f.rank > rank]
        for rows in ([factors[i].a[rank] for i in tall], [factors[i].b[:, rank] for i in tall]):
            x = torch.stack(rows).double()
            gram[torch.tensor(tall)[:, None], torch.tensor(tall)] += x @ x.T
    return gram
