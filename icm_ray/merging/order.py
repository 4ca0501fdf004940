"""A merge as it was ordered: every name, shape and piece of evidence checked beforehand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from icm_ray.adapters import check_together
from icm_ray.errors import InputError, RecipeError
from icm_ray.evidence.tensors import TASK, Given, given
from icm_ray.merging.cut import RankRule
from icm_ray.methods import Method, find_method
from icm_ray.types import RankPolicy


@dataclass(frozen=True)
class MergeOrder:
    """A checked merge, small enough to send to every worker.

    Attributes:
        method: Row name.
        params: Every parameter bound.
        rule: The parsed rank policy.
        output_rank: The rank policy as given.
        present: For each module, sorted, the tasks that have it, sorted.
        tasks: All task names, sorted.
        seed: Seed of the merge.
        evidence: What the method is told, opened and checked.
        statistics: What the passes over all modules concluded so far.
    """

    method: str
    params: Mapping[str, Any]
    rule: RankRule
    output_rank: RankPolicy
    present: Mapping[str, tuple[str, ...]]
    tasks: tuple[str, ...]
    seed: int
    evidence: Given | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)


def plan_merge(
    adapters: Sequence[Any],
    method: str,
    params: Mapping[str, Any] | None,
    evidence: object | None,
    output_rank: RankPolicy,
    seed: int,
    *,
    is_gathered_later: bool = False,
) -> MergeOrder:
    """Check everything a merge needs before any arithmetic; `adapters` may be open files.

    With `is_gathered_later`, evidence that the method needs may still be missing.
    """
    row = find_method(method)
    if not adapters:
        raise InputError("adapters: none given but at least one is expected.")
    bound = row.bind(params, [adapter.name for adapter in adapters])
    check_together(adapters, values=False)  # its warnings about values are `plan`'s to show
    largest = max(adapter.max_rank for adapter in adapters)
    rule = RankRule.parse(output_rank, row.default_rank, largest)
    tasks = tuple(sorted(adapter.name for adapter in adapters))
    by_name = {adapter.name: adapter for adapter in adapters}
    modules = sorted({module for adapter in adapters for module in adapter.modules})
    present = {m: tuple(t for t in tasks if m in by_name[t].modules) for m in modules}
    if evidence is not None and not row.takes:
        raise RecipeError(f"evidence: given but method {row.name!r} uses none. Leave it out.")
    told = given(evidence)
    if told and row.prepare:
        told = row.prepare(told, tasks, **bound)
    if told or not is_gathered_later:
        _check_evidence(row, told, present, adapters)
    return MergeOrder(method, bound, rule, output_rank, present, tasks, seed, told)


def idle_lines(order: MergeOrder) -> list[str]:
    """Return a line naming the adapters that a weight of 0 keeps out of the merge, if any."""
    weights = order.params.get("weights")
    names = [name for name, weight in weights.items() if weight == 0] if weights else []
    return [f"{', '.join(names)}: weight 0, so not part of the merge."] if names else []


_GATHERED = ", or name base and data in a recipe of jobs.merge."


_ADVICE = {
    "LearnedMerge": f"Make it with jobs.learn{_GATHERED}",
    "GramStatistics": f"Make it with jobs.evidence{_GATHERED}",
    "FusionModel": "Train one with jobs.train_fusion.",
}


def _check_evidence(
    row: Method,
    told: Given | None,
    present: Mapping[str, tuple[str, ...]],
    adapters: Sequence[Any],
) -> None:
    """Refuse evidence that is missing, useless to the method, incomplete, or of other adapters."""
    if told is None:
        if row.needs:
            raise RecipeError(
                f"evidence: none but method {row.name!r} needs {row.needs}. {_ADVICE[row.needs]}"
            )
        return
    problems = [
        f"evidence: of another adapter than {a.name!r} given here. Gather it again."
        for a in adapters
        if told.adapters and told.adapters.get(a.name) != _fingerprint(a)
    ]
    of_these_only = row.needs == "LearnedMerge" or told.kind == "learned_merge"
    if of_these_only and told.adapters.keys() - {a.name for a in adapters}:
        missing = ", ".join(sorted(told.adapters.keys() - {a.name for a in adapters}))
        problems.append(
            f"evidence: learned with {missing} too. Merge the adapters it was learned from."
        )
    used = 0
    for kind in row.takes:
        found = {m: told.keys(m, kind, tasks) for m, tasks in present.items()}
        used += sum(map(len, found.values()))
        for module, tasks in present.items():
            expected = len(tasks) if kind.endswith(TASK) else 1
            some_lack = any(found.values()) and not row.needs
            if len(found[module]) < expected and (found[module] or some_lack):
                problems.append(
                    f"evidence: {module}.{kind}: {len(found[module])} of {expected} tensors. "
                    "Give all of them, or none of the kind."
                )
    if not used:
        problems.append(
            f"evidence: no tensor of use to {row.name!r} but names such as "
            f"{next(iter(present))}.{next(iter(row.takes))} are expected. See docs/evidence.md."
        )
    if problems:
        raise InputError(problems)


def _fingerprint(adapter: Any) -> str:
    value = adapter.fingerprint
    return str(value() if callable(value) else value)
