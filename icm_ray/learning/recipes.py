"""From a recipe's words to the learner's objects, and each learned method's own recipe.

spec = spec_of("nsc", {"start": {"value": "1/K"}})
plan = plan_of(spec, adapters, grams)
learn(base.model, plan.learning(base), tasks)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icm_ray.adapters import load_adapter
from icm_ray.base_model.loading import Base
from icm_ray.config import (
    LearnSpec,
    ObjectiveSpec,
    OptimisationSpec,
    ParametersSpec,
    StartSpec,
    changed,
)
from icm_ray.errors import InputError, RecipeError
from icm_ray.evidence.tensors import Evidence
from icm_ray.learning.gradients import Learning
from icm_ray.learning.objectives import objective_of
from icm_ray.learning.parameters import Coefficients, CoreMatrices, Factors, Parameters
from icm_ray.learning.terms import (
    ReadGrams,
    Terms,
    own_terms,
    regmean_terms,
    summed,
    tsv_terms,
)
from icm_ray.linalg.gram import GRAM_KINDS
from icm_ray.merging.merge import merge
from icm_ray.methods import METHODS
from icm_ray.types import Adapter, LoRAFactors

LEARNERS: Mapping[str, LearnSpec] = {
    # Paper: arXiv 2603.26317, the schedule for vision; configs/learn has those for language.
    "nsc": LearnSpec(
        objective=ObjectiveSpec(kind="null_space_ratio"),
        start=StartSpec(value=0.4),
        optimisation=OptimisationSpec(steps=100, lr=1e-3, batch=32),
    ),
    # Chosen on validation data of one set of experts; docs/experiments.md has what was tried.
    "row_space_match": LearnSpec(
        parameters=ParametersSpec(kind="cores"),
        objective=ObjectiveSpec(kind="row_space_match", names="all", share=1e-9),
        start=StartSpec(value=0.0, residual="regmean"),
        optimisation=OptimisationSpec(steps=60, lr=0.1, weight_decay=0.0, schedule="cosine"),
    ),
    "task_vector_match": LearnSpec(
        parameters=ParametersSpec(kind="cores"),
        objective=ObjectiveSpec(kind="task_vector_match"),
        start=StartSpec(value=0.0, residual="regmean"),
        optimisation=OptimisationSpec(steps=120, lr=0.1, weight_decay=0.0, schedule="cosine"),
    ),
    # Chosen on validation data of the generation suite; the other suites take it as it is.
    "distillation": LearnSpec(
        parameters=ParametersSpec(kind="cores"),
        objective=ObjectiveSpec(kind="distillation"),
        start=StartSpec(value=0.0, residual="regmean"),
        optimisation=OptimisationSpec(steps=120, lr=0.1, weight_decay=0.0, schedule="cosine"),
    ),
    # Paper: arXiv 2310.02575, layer-wise; coefficients are cut to [0, 1] as in its code.
    "adamerging": LearnSpec(
        parameters=ParametersSpec(link="clamp"),
        objective=ObjectiveSpec(kind="entropy"),
        start=StartSpec(value=0.3),
        optimisation=OptimisationSpec(
            steps=500, lr=1e-3, optimizer="adam", weight_decay=0.0, batch=16
        ),
    ),
    # Paper: arXiv 2407.02880, few-shot: labels of the calibration split, nothing at the start.
    "atlas": LearnSpec(
        objective=ObjectiveSpec(kind="supervised"),
        start=StartSpec(value=0.0),
        optimisation=OptimisationSpec(steps=100, lr=1e-1, weight_decay=0.1),
    ),
    # Paper: arXiv 2410.13025, CAT: a coefficient a layer and LoRA. Steps and rate are aTLAS's here.
    "lora_soups": LearnSpec(
        objective=ObjectiveSpec(kind="supervised"),
        start=StartSpec(value="1/K"),
        optimisation=OptimisationSpec(steps=100, lr=1e-1, weight_decay=0.0),
    ),
    # A control: what one LoRA reaches that is trained on all tasks, as the experts are on theirs.
    "joint": LearnSpec(
        parameters=ParametersSpec(kind="factors"),
        objective=ObjectiveSpec(kind="supervised"),
        optimisation=OptimisationSpec(
            steps=200, lr=5e-3, weight_decay=0.0, schedule="linear", batch=32
        ),
    ),
}


def spec_of(method: str, changes: Mapping[str, Mapping[str, Any]]) -> LearnSpec:
    """Return a learned method's recipe with the user's changes.

    Raises:
        RecipeError: the method learns nothing, or changes name what does not exist.
    """
    if method not in LEARNERS:
        raise RecipeError(
            f"method: {method!r} learns nothing but one of {', '.join(LEARNERS)} is expected."
        )
    return changed(LEARNERS[method], changes, "learn")


@dataclass(frozen=True)
class Plan:
    """Everything a worker needs to make the same parameters and objective as the driver.

    Attributes:
        spec: The recipe.
        terms: What is combined, with any residual.
        value: Start value of the parameters.
    """

    spec: LearnSpec
    terms: Terms
    value: float

    def parameters(self) -> Parameters:
        """Return fresh parameters at their start."""
        how = self.spec.parameters
        if how.kind == "cores":
            return CoreMatrices(self.terms, self.value, extend=how.extend)
        if how.kind == "factors":
            return Factors(self.terms, how.rank)
        return Coefficients(
            self.terms, self.value, sharing=how.sharing, groups=how.groups, link=how.link
        )

    def learning(self, base: Base) -> Learning:
        """Return what a run needs: fresh parameters, and the objective over this base."""
        objective = objective_of(self.spec.objective, base)
        return Learning(self.parameters(), objective, self.spec.optimisation)


def grams_in(evidence: Evidence, tasks: Sequence[str]) -> ReadGrams:
    """Return what reads some tasks' Gram statistics, a module at a time."""
    kinds = [f"{kind}.<task>" for kind in GRAM_KINDS]
    return lambda module: evidence.of(module, kinds, tasks)


def needs_grams(spec: LearnSpec) -> bool:
    """Say whether Gram statistics have to be gathered before the plan is made."""
    return "regmean" in (spec.start.basis, spec.start.residual)


def plan_of(spec: LearnSpec, adapters: Sequence[Adapter], grams: ReadGrams | None = None) -> Plan:
    """Make the terms a recipe starts from.

    Args:
        spec: The recipe.
        adapters: All adapters of the merge.
        grams: Gram statistics, if `needs_grams` says so.
    """
    own = own_terms(adapters)
    share = regmean_terms(own, grams, rho=spec.start.rho) if grams is not None else None
    bases: dict[str, Terms | None] = {"own": own, "tsv": None, "regmean": share}
    terms = tsv_terms(own) if spec.start.basis == "tsv" else bases[spec.start.basis]
    residual = _residual(spec.start, adapters, share)
    if terms is None:
        raise RecipeError("start.basis: regmean but no Gram statistics were gathered.")
    if residual is not None:
        terms = terms.with_residual(residual)
    value = 1 / len(adapters) if spec.start.value == "1/K" else float(spec.start.value)
    return Plan(spec, terms, value)


def _residual(
    start: StartSpec, adapters: Sequence[Adapter], share: Terms | None
) -> dict[str, LoRAFactors] | None:
    if start.residual is None:
        return None
    if start.residual == "regmean":
        if share is None:
            raise RecipeError("start.residual: regmean but no Gram statistics were gathered.")
        return summed(share, start.residual_scale)
    saved = _merged(start.residual, adapters)
    theirs = {f.shape for a in adapters for f in a.modules.values()}
    if not {f.shape for f in saved.modules.values()} <= theirs:
        raise InputError(f"{start.residual}: shapes differ from the adapters'. Choose their merge.")
    scale = start.residual_scale
    return {m: LoRAFactors(f.a, f.b * scale) for m, f in saved.modules.items()}


def _merged(name: str, adapters: Sequence[Adapter]) -> Adapter:
    """Return the merge that a start names: of a method at its defaults, or out of a folder."""
    if name not in METHODS:
        return load_adapter(Path(name))
    if needs := METHODS[name].needs:
        raise RecipeError(
            f"start.residual: {name!r} needs {needs}. Merge with it first, and name the folder."
        )
    return merge(adapters, name).adapter
