"""How much of each expert is in a learned merge, module by module: what a picture shows of it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from icm_ray.evidence.learned import LearnedMerge
from icm_ray.evidence.rebuild import bases
from icm_ray.linalg.subspace import row_space
from icm_ray.types import Adapter, LoRAFactors

Shares = dict[str, dict[str, float]]
"""By task and module."""


def shares_of(learned: LearnedMerge, adapters: Sequence[Adapter]) -> tuple[Shares, bool]:
    """Return the share of each expert in each module, and whether it is that of a core matrix.

    A coefficient is its own share; of several for groups of ranks it is the mean. A core matrix
    has none: its share is `|U_k' delta V_k| / |delta_k|` in the Frobenius norm, with U_k and V_k
    orthonormal bases of the expert's own column and row space. That is 1 for the expert alone, and
    leaves out the fixed start beneath the core.
    """
    shares: Shares = {task: {} for task in learned.tasks}
    core = any(name.endswith(".core") for name in learned.tensors)
    for name, tensor in learned.tensors.items():
        module, _, kind = name.rpartition(".")
        own = {a.name: a.modules[module] for a in adapters if module in a.modules}
        if kind == "coefficients":
            values = tensor.float().mean(1).tolist()
            for task, value in zip(learned.tasks, values, strict=True):
                if task in own:
                    shares[task][module] = value
        elif kind == "core":
            for task, value in _core_shares(tensor, own, *_bases(learned, module, own)).items():
                shares[task][module] = value
    return shares, core


def _bases(
    learned: LearnedMerge, module: str, own: dict[str, LoRAFactors]
) -> tuple[Tensor, Tensor]:
    """Return what stands around a core: as stored, or bases of stored terms or the experts'."""
    stored = learned.tensors
    if f"{module}.left" in stored:
        return stored[f"{module}.left"].float(), stored[f"{module}.right"].float()
    return bases(
        {
            task: LoRAFactors(stored[f"{module}.a.{task}"], stored[f"{module}.b.{task}"])
            if f"{module}.a.{task}" in stored
            else factors
            for task, factors in sorted(own.items())
        }
    )


def _core_shares(
    core: Tensor, own: dict[str, LoRAFactors], left: Tensor, right: Tensor
) -> dict[str, float]:
    core = core.diag() if core.ndim == 1 else core
    if core.shape != (left.shape[1], right.shape[0]):
        return {}  # the bases span the residual too, which is not at hand here
    found = {}
    for task, factors in own.items():
        inside = (row_space(factors.b.T).T @ left) @ core.float() @ (right @ row_space(factors.a))
        whole = torch.linalg.matrix_norm(factors.b @ factors.a)
        found[task] = float(torch.linalg.matrix_norm(inside) / whole) if whole > 0 else 0.0
    return found
