"""One rank budget over all modules: where a rank holds most, whichever module it is in."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor
from torch.nn.functional import normalize

from icm_ray.linalg import lowrank
from icm_ray.merging.module import MergedModule
from icm_ray.methods.steps import Steps
from icm_ray.types import LoRAFactors


def within(merged: Mapping[str, MergedModule], total: int, steps: Steps) -> dict[str, MergedModule]:
    """Cut modules so that their ranks add up to `total` at most: the largest singular values stay.

    Every module keeps one rank; beyond that no choice of ranks loses less of the squared norm of
    the whole change. Where modules were cut for their inputs, it is the sum of the shares that they
    lose: outputs of two modules are not of one scale. An adapter of one task has a budget of its
    own.

    Args:
        merged: Every module, its columns by descending singular value, as `cut` leaves them.
        total: Sum of ranks to keep; at least the number of modules.
        steps: A restored norm is restored once more after the cut.
    """
    ranks = _ranks(_values(merged), total)
    tasks = sorted({task for one in merged.values() for task in one.tasks})
    own = {
        task: _ranks(
            {m: _strengths(x.tasks[task]) for m, x in merged.items() if task in x.tasks}, total
        )
        for task in tasks
    }
    return {
        module: _cut(one, ranks[module], {task: own[task][module] for task in one.tasks}, steps)
        for module, one in merged.items()
    }


def _strengths(factors: LoRAFactors) -> Tensor:
    return factors.b.double().norm(dim=0) * factors.a.double().norm(dim=1)


def _values(merged: Mapping[str, MergedModule]) -> dict[str, Tensor]:
    """Return what each module's ranks hold: of the whole adapter, or of the module alone."""
    plain = {module: _strengths(one.factors) for module, one in merged.items()}
    if all(one.values is None for one in merged.values()):
        return plain
    # A module whose inputs nobody knows counts by its weights.
    alone = {module: normalize(values, dim=0) for module, values in plain.items()}
    return {m: alone[m] if one.values is None else one.values for m, one in merged.items()}


def _ranks(spectra: Mapping[str, Tensor], total: int) -> Counter[str]:
    """Return how many of the `total` largest values each module has, one at least."""
    values = [
        (place > 0, -value, module)
        for module, spectrum in spectra.items()
        for place, value in enumerate(spectrum.tolist())
    ]
    return Counter(module for *_, module in sorted(values)[:total])


def _cut(one: MergedModule, rank: int, own: Mapping[str, int], steps: Steps) -> MergedModule:
    factors, share = _first(one.factors, rank)
    if steps.restore_norm and share > 0:
        factors = replace(factors, b=factors.b * share**-0.5)
    energy = one.report.retained_energy * share
    tasks = {task: _first(one.tasks[task], kept) for task, kept in own.items()}
    report = replace(
        one.report,
        rank=rank,
        output_norm=lowrank.norm(factors.b, factors.a),
        retained_energy=energy,
        truncation_error=max(1.0 - energy, 0.0) ** 0.5,
        task_energy={t: one.report.task_energy[t] * kept for t, (_, kept) in tasks.items()},
        # How fewer ranks change what inputs see of a cut by weights is not known.
        seen_energy=None if one.values is None else float(one.values[:rank].square().sum()),
    )
    return MergedModule(factors, report, {task: cut for task, (cut, _) in tasks.items()})


def _first(factors: LoRAFactors, rank: int) -> tuple[LoRAFactors, float]:
    """Return the first ranks alone, and the share of the squared norm they hold."""
    first = replace(factors, a=factors.a[:rank].contiguous(), b=factors.b[:, :rank].contiguous())
    whole = lowrank.norm(factors.b, factors.a)
    return first, (lowrank.norm(first.b, first.a) / whole) ** 2 if whole > 0 else 1.0
