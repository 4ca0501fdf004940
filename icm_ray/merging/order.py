"""A merge as it was ordered: every name, shape and piece of evidence checked beforehand."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from icm_ray.adapters import check_together
from icm_ray.adapters.blocks import depths_of, runs_of
from icm_ray.config import MergeRecipe
from icm_ray.errors import InputError, RecipeError
from icm_ray.evidence.tensors import TASK, Evidence, as_evidence
from icm_ray.files import sha256_of
from icm_ray.kinds import CutMetric
from icm_ray.linalg.gram import GRAM_KINDS
from icm_ray.merging.cut import RankRule
from icm_ray.merging.requirements import refuse_blind
from icm_ray.methods import Method, find_method
from icm_ray.methods.steps import STEPS, Steps
from icm_ray.types import RankPolicy

SEEN = tuple(f"{kind}.{TASK}" for kind in GRAM_KINDS)
"""Tensors that tell of a module's inputs, one of each kind a task."""


@dataclass(frozen=True)
class MergeRequest:
    """What is asked of a merge, whatever the adapters; see `icm_ray.merge` for the fields."""

    method: str
    params: Mapping[str, Any] | None = None
    evidence: object | None = None
    output_rank: RankPolicy = None
    seed: int = 0
    device: str = "cpu"
    output_metric: CutMetric | None = None

    @classmethod
    def of(cls, recipe: MergeRecipe) -> "MergeRequest":
        """Return what a recipe asks for; evidence as the path it names, if it is whole by now."""
        evidence = Path(recipe.evidence) if recipe.evidence and recipe.data is None else None
        where = recipe.resources.device
        rank, metric = recipe.output.rank, recipe.output.metric
        return cls(recipe.method, recipe.params, evidence, rank, recipe.seed, where, metric)

    def key(self, adapters: Sequence[Any]) -> str:
        """Return what identifies the result: the same request of the same adapters."""
        evidence = as_evidence(self.evidence)
        prints = {adapter.name: adapter.fingerprint for adapter in adapters}
        params = find_method(self.method).bind(self.params, list(prints))  # defaults may move
        asked = [self.method, params, self.output_rank, self.seed]
        asked += [self.device] if self.device != "cpu" else []  # kinds of devices round differently
        asked += [self.output_metric] if self.output_metric else []
        return sha256_of(["merge", asked, evidence.identity if evidence else None, prints])


@dataclass(frozen=True)
class MergeOrder:
    """A checked merge, small enough to send to every worker.

    Attributes:
        method: Row name.
        params: Every parameter of the method, bound.
        rule: The parsed rank policy.
        output_rank: The rank policy as given.
        output_metric: What a cut keeps most of.
        present: For each module, sorted, the tasks that have it, sorted.
        tasks: All task names, sorted.
        seed: Seed of the merge.
        evidence: What the method is told, opened and checked.
        statistics: What the passes over all modules concluded so far.
        device: Where the arithmetic is done.
        steps: What is done around the method.
        depths: How deep each module of a block is, from 0 to 1, if a step asks.
        weights: By module: one number a task, where `weights` differ between groups of layers.
    """

    method: str
    params: Mapping[str, Any]
    rule: RankRule
    output_rank: RankPolicy
    output_metric: CutMetric
    present: Mapping[str, tuple[str, ...]]
    tasks: tuple[str, ...]
    seed: int
    evidence: Evidence | None = None
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    device: str = "cpu"
    steps: Steps = field(default_factory=Steps)
    depths: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    def params_at(self, module: str) -> Mapping[str, Any]:
        """Return the method's parameters for a module: its own layer group's weights among them."""
        return {**self.params, "weights": self.weights[module]} if self.weights else self.params

    def silent_at(self, module: str) -> set[str]:
        """Tasks that a weight of 0 keeps out of a module."""
        weights = self.params_at(module).get("weights") or {}
        return {task for task, weight in weights.items() if weight == 0}

    @property
    def idle(self) -> set[str]:
        """Tasks that weights of 0 keep out of the whole merge."""
        return set.intersection(*map(self.silent_at, self.present))


def plan_merge(
    adapters: Sequence[Any], request: MergeRequest, *, is_gathered_later: bool = False
) -> MergeOrder:
    """Check everything a merge needs before any arithmetic.

    Args:
        adapters: Loaded ones or open files.
        request: What is asked for.
        is_gathered_later: Whether evidence that the method needs may still be missing.

    Raises:
        RecipeError: unknown method, parameter or rank policy, or evidence that nobody reads.
        InputError: the adapters, or the evidence and they, do not fit together.
    """
    row = find_method(request.method)
    if not adapters:
        raise InputError("adapters: none given but at least one is expected.")
    bound = row.bind(request.params, [adapter.name for adapter in adapters])
    steps = Steps(**{name: bound.pop(name) for name in STEPS if name in bound})
    if steps.calibrate and row.needs in ("learned_merge", "fusion_model"):
        raise RecipeError(
            f"params.calibrate: {steps.calibrate!r} but method {row.name!r} was learned on the "
            "adapters as they are. Leave it out."
        )
    refuse_blind(row.name, request.output_metric)
    check_together(adapters, values=False)  # its warnings about values are `plan`'s to show
    largest = max(adapter.max_rank for adapter in adapters)
    rule = RankRule.parse(request.output_rank, row.default_rank, largest)
    tasks = tuple(sorted(adapter.name for adapter in adapters))
    by_name = {adapter.name: adapter for adapter in adapters}
    modules = sorted({module for adapter in adapters for module in adapter.modules})
    present = {m: tuple(t for t in tasks if m in by_name[t].modules) for m in modules}
    if rule.kind == "total" and rule.number < len(modules):
        raise RecipeError(
            f"output.rank: {request.output_rank!r} but {len(modules)} modules keep a rank each. "
            f"Give total:{len(modules)} or more."
        )
    takes = dict.fromkeys([*row.takes, *(SEEN if request.output_metric == "inputs" else ())])
    if request.evidence is not None and not takes:
        raise RecipeError(
            f"evidence: given but method {row.name!r} uses none. Leave it out, or set "
            "output.metric: inputs for a cut that reads Gram statistics."
        )
    evidence = as_evidence(request.evidence)
    if evidence and row.prepare:
        evidence = row.prepare(evidence, tasks, **bound)
    if evidence or not is_gathered_later:
        _check_evidence(row, evidence, present, adapters, list(takes))
    return MergeOrder(
        row.name,
        bound,
        rule,
        request.output_rank,
        _metric(request, evidence, present, is_gathered_later),
        present,
        tasks,
        request.seed,
        evidence,
        device=request.device,
        steps=steps,
        depths=depths_of(modules) if steps.asked else {},
        weights=_by_module(bound.get("weights"), modules),
    )


def _by_module(
    weights: Mapping[str, float | Sequence[float]] | None, modules: Sequence[str]
) -> Mapping[str, Mapping[str, float]]:
    """Return each module's weights if some task's differ between groups of layers, else nothing."""
    grouped = {t: list(w) for t, w in (weights or {}).items() if isinstance(w, Sequence)}
    if not weights or not grouped:
        return {}
    plain = {task: w for task, w in weights.items() if not isinstance(w, Sequence)}
    runs = {count: runs_of(modules, count) for count in set(map(len, grouped.values()))}
    return {
        module: plain | {task: own[runs[len(own)][module]] for task, own in grouped.items()}
        for module in modules
    }


def _metric(
    request: MergeRequest,
    evidence: Evidence | None,
    present: Mapping[str, tuple[str, ...]],
    is_gathered_later: bool,
) -> CutMetric:
    """Return what a cut keeps most of: what inputs see, if Gram statistics tell of them."""
    seen = evidence and any(
        evidence.keys(module, kind, tasks) for module, tasks in present.items() for kind in SEEN
    )
    if request.output_metric is None:
        return "inputs" if seen else "weights"
    if request.output_metric == "inputs" and not seen and (evidence or not is_gathered_later):
        raise RecipeError(
            f"output.metric: inputs but no Gram statistics. {_ADVICE['gram_statistics']}"
        )
    return request.output_metric


def idle_lines(order: MergeOrder) -> list[str]:
    """Return a line naming the adapters that a weight of 0 keeps out of the merge, if any."""
    names = sorted(order.idle)
    return [f"{', '.join(names)}: weight 0, so not part of the merge."] if names else []


_GATHERED = ", or name base and data in a recipe of jobs.merge."


_ADVICE = {
    "learned_merge": f"Make it with jobs.learn{_GATHERED}",
    "gram_statistics": f"Make it with jobs.evidence{_GATHERED}",
    "fusion_model": "Train one with jobs.train_fusion.",
}


def _check_evidence(
    row: Method,
    evidence: Evidence | None,
    present: Mapping[str, tuple[str, ...]],
    adapters: Sequence[Any],
    takes: Sequence[str],
) -> None:
    """Refuse evidence that is missing, useless to the method, incomplete, or of other adapters."""
    if evidence is None:
        if row.needs:
            raise RecipeError(
                f"evidence: none but method {row.name!r} needs {row.needs}. {_ADVICE[row.needs]}"
            )
        return
    problems = [
        f"evidence: of another adapter than {a.name!r} given here. Gather it again."
        for a in adapters
        if evidence.adapters and evidence.adapters.get(a.name) != a.fingerprint
    ]
    by = evidence.described.get("method", row.name)
    if by != row.name:
        problems.append(
            f"evidence: learned with {by!r} but method is {row.name!r}. Set method: {by}, or learn "
            f"with {row.name}."
        )
    of_these_only = row.needs == "learned_merge" or evidence.kind == "learned_merge"
    if of_these_only and evidence.adapters.keys() - {a.name for a in adapters}:
        missing = ", ".join(sorted(evidence.adapters.keys() - {a.name for a in adapters}))
        problems.append(
            f"evidence: learned with {missing} too. Merge the adapters it was learned from."
        )
    used = 0
    for kind in takes:
        names = {m: evidence.keys(m, kind, tasks) for m, tasks in present.items()}
        used += sum(map(len, names.values()))
        for module, tasks in present.items():
            expected = len(tasks) if kind.endswith(TASK) else 1
            some_lack = any(names.values()) and not row.needs and kind not in SEEN
            if len(names[module]) < expected and (names[module] or some_lack):
                problems.append(
                    f"evidence: {module}.{kind}: {len(names[module])} of {expected} tensors. "
                    "Give all of them, or none of the kind."
                )
    if not used:
        problems.append(
            f"evidence: no tensor of use to {row.name!r} but names such as "
            f"{next(iter(present))}.{takes[0]} are expected. See docs/evidence.md."
        )
    if problems:
        raise InputError(problems)
