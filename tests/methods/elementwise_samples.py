"""Dense results of element-wise methods, and the plain code they are compared with."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from icm_ray import METHODS
from icm_ray.types import Delta, LoRAFactors, ModuleContext

Experts = Mapping[str, Mapping[str, LoRAFactors]]  # task -> module -> factors


def merged(method: str, experts: Experts, *, seed: int = 0, **params: Any) -> dict[str, Tensor]:
    """Return the dense result of every module, before any cut."""
    row, tasks = METHODS[method], tuple(sorted(experts))
    evidence = params.pop("evidence", {})
    bound = row.bind(params, tasks)
    modules = sorted({module for factors in experts.values() for module in factors})
    statistics: dict[str, Tensor] = {}

    def calls() -> Any:
        for module in modules:
            present = tuple(task for task in tasks if module in experts[task])
            factors = [experts[task][module] for task in present]
            extra = {"evidence": evidence.get(module)} if row.takes else {}
            context = ModuleContext(module, present, tasks, seed, statistics)
            yield module, factors, {"context": context, **extra, **bound}

    for one in row.passes(**bound):
        total: dict[str, Tensor] = {}
        for _, factors, keywords in calls():
            for name, value in one.measure(factors, **keywords).items():
                total[name] = total.get(name, 0) + value
        statistics |= one.conclude(total, tasks=tasks, statistics=statistics, **bound)
    results = {module: row.function(factors, **keywords) for module, factors, keywords in calls()}
    return {m: r.dense() if isinstance(r, Delta) else r.delta() for m, r in results.items()}


def all_modules(experts: Experts) -> dict[str, tuple[int, int]]:
    return {m: f.shape for factors in experts.values() for m, f in sorted(factors.items())}


def dense(experts: Experts) -> dict[str, Tensor]:
    """Return `(tasks, d_out, d_in)` by module, zeros for a task that lacks it."""
    shapes = all_modules(experts)
    return {
        m: torch.stack(
            [
                experts[t][m].delta() if m in experts[t] else torch.zeros(shapes[m])
                for t in sorted(experts)
            ]
        )
        for m in sorted(shapes)
    }


def combined(trimmed: Tensor, election: Tensor, zero: int, weights: Tensor, mean: str) -> Tensor:
    """Elect, and put together who agrees; `mean` says what divides."""
    signs = election.sign()
    signs[signs == 0] = zero
    agrees = (trimmed * signs) > 0
    total = (trimmed * weights * agrees).sum(0)
    if mean == "sum":
        return total
    divisor = (weights * agrees if mean == "weights" else agrees.float()).sum(0)
    return total / torch.where(divisor == 0, 1.0, divisor)


def masks(experts: Experts, kinds: Mapping[str, Callable[[LoRAFactors], Tensor]]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        m: {
            f"{kind}.{t}": (torch.rand(of(experts[t][m]).shape, generator=generator) < 0.6).float()
            for kind, of in kinds.items()
            for t in sorted(experts)
        }
        for m in all_modules(experts)
    }


DELTA = {"mask": lambda f: f.delta()}
FACTORS = {"mask_a": lambda f: f.a, "mask_b": lambda f: f.b}


def three_experts(make_adapter: Callable[..., Any]) -> Experts:
    """Three random adapters of unequal ranks; no two entries are equal."""
    shapes = {"m": (12, 9), "n": (5, 14)}
    made = [make_adapter(n, shapes=shapes, rank=r) for n, r in zip("abc", (2, 3, 1), strict=True)]
    return {adapter.name: adapter.modules for adapter in made}
