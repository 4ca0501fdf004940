"""Conflicts between vectors, projected out; the result does not depend on any order."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def oriented(vectors: Float[Tensor, "tasks n"]) -> Float[Tensor, "tasks n"]:
    """Return for each vector the nearest one that points against none of the others.

    `g_i = argmin |g - v_i|^2` with `<g, v_j> >= 0` for all j other than i, which is `v_i` plus a
    non-negative combination of the others: one small non-negative least-squares problem.

    Paper: ICM-Fusion, arXiv 2508.04153, "adjusting the orientation of the task vectors", which it
    does not define.
    Differs: projecting one conflict after the other (PCGrad, arXiv 2001.06782) gives the same for
    two vectors; for more, what it gives depends on the order and may still conflict.

    Cost: O(tasks^2 n + tasks^4).
    """
    from scipy.optimize import nnls  # .3 s that few commands need

    lengths = vectors.double().norm(dim=1, keepdim=True)
    units = (vectors.double() / lengths.clamp(min=1e-30)).cpu().numpy()
    scaled = units * lengths.cpu().numpy()
    result = scaled.copy()
    for i in range(len(units)):
        others = np.delete(np.arange(len(units)), i)
        if len(others) and (units[others] @ scaled[i]).min() < 0:
            away, _ = nnls(units[others].T, -scaled[i])
            result[i] = scaled[i] + away @ units[others]
    return torch.from_numpy(result).to(vectors)


def fused_direction(
    vectors: Float[Tensor, "tasks n"], shares: Float[Tensor, " tasks"]
) -> Float[Tensor, " n"]:
    """Return the sum of the oriented vectors at the mean length of the vectors.

    Vectors that cancel, such as two opposite ones, give zero.
    """
    total = (shares[:, None] * oriented(vectors)).sum(0)
    length = (shares * vectors.norm(dim=1)).sum() / shares.sum()
    if float(total.norm()) <= 1e-6 * float(length):
        return torch.zeros_like(total)
    return length * total / total.norm()


def leanings(
    vectors: Float[Tensor, "tasks n"],
    direction: Float[Tensor, " n"],
    shares: Float[Tensor, " tasks"],
    temperature: float | None,
) -> Float[Tensor, " tasks"]:
    """Return weights that sum to one: more for tasks that point where the fusion points.

    `w_i` in proportion to `shares_i exp(cos(v_i, direction) / temperature)`; None, or no direction
    at all, leaves the shares alone.
    """
    if temperature is None or not bool(direction.any()):
        return shares / shares.sum()
    cosines = torch.nn.functional.cosine_similarity(vectors, direction[None], dim=1)
    raised = shares * ((cosines - cosines.max()) / temperature).exp()
    return raised / raised.sum()
