"""Fusion in context (F3): the fused latent, then the LoRA itself, descend on a few inputs.

Both are `Parameters` of the learner, so `learning.learner.learn`, its checkpoints and its Ray
actors run them like any other; what they store is evidence for method `icm_fusion`.

    plan = latent_plan(fusion, adapters)
    first = plan.learning(base); learn(base.model, first, tasks)
    then = direct_plan(adapters, first.parameters.parts())   # Eq. 8, from there on
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from icm_ray.base_model.loading import Base
from icm_ray.config import LearnSpec, ObjectiveSpec, OptimisationSpec
from icm_ray.errors import RecipeError
from icm_ray.evidence.learned import LearnedMerge
from icm_ray.fusion_vae.layout import Part
from icm_ray.fusion_vae.model import FusionModel, Point
from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.learner import Progress, Run, learn
from icm_ray.learning.parameters import Frame
from icm_ray.learning.recipes import Plan
from icm_ray.learning.terms import Terms, own_terms
from icm_ray.types import Adapter, LoRAFactors

IN_CONTEXT = LearnSpec(
    objective=ObjectiveSpec(kind="task_vector_match"),
    optimisation=OptimisationSpec(
        steps=60, lr=0.1, optimizer="adam", weight_decay=0.0, schedule="linear"
    ),
)
"""How the latent moves: 60 steps of Adam, from 0.1 down to zero."""
DIRECT = LearnSpec(
    objective=ObjectiveSpec(kind="task_vector_match"),
    optimisation=OptimisationSpec(
        steps=40, lr=0.05, optimizer="adam", weight_decay=0.0, schedule="cosine"
    ),
)
"""How the LoRA moves afterwards."""


class LatentParameters:
    """The fused latent z and task vector v; the frozen decoder makes every module's core of them.

    Paper: ICM-Fusion, arXiv 2508.04153, "in-context meta adaptation", which it does not define.
    """

    def __init__(
        self,
        model: FusionModel,
        terms: Terms,
        point: Point,
        constant: Tensor | None = None,
    ) -> None:
        """Start at a point of the latent space.

        Args:
            model: The trained Fusion-VAE; its network stays as it is.
            terms: The adapters that are fused, with any residual beneath.
            point: Where to start.
            constant: `(D,)`, added to whatever is decoded.
        """
        self.model, self.terms, self.constant = model, terms, constant
        self.leaves = {
            "v": point.v.clone().requires_grad_(),
            "z": point.z.clone().requires_grad_(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return z and v."""
        return self.leaves

    def parts(self) -> dict[str, Part]:
        """Return each module's change at the present values."""
        x = self.model.vae.decode(self.leaves["z"][None], self.leaves["v"][None])[0]
        made = self.model.layout.parts(x if self.constant is None else x + self.constant)
        return {path: made[path] for path in self.terms.modules}

    @property
    def frames(self) -> dict[str, Frame]:
        """What stands around each module's core; factors themselves in the gauges of factors."""
        return _frames(self.parts(), self.terms)

    def cores(self) -> dict[str, Tensor]:
        """Return each module's core as a function of z and v."""
        return {path: part.core for path, part in self.parts().items()}

    def learned(self) -> dict[str, Tensor]:
        """Return the fused change of every module, as method `icm_fusion` reads it."""
        with torch.no_grad():
            return _stored(self.parts(), self.terms)


class DirectParameters:
    """A free core for every module, from a fused adapter on: Eq. 8's steps on the LoRA itself.

    A leaf is the change from the start in units in which ones have the start's Frobenius norm.
    """

    def __init__(self, parts: Mapping[str, Part], terms: Terms) -> None:
        """Start at the parts."""
        self.terms = terms
        self.begin = {path: _free(part) for path, part in parts.items()}
        self.frames = _frames(self.begin, terms)
        self.units = {
            m: float(p.core.norm()) / max(*p.core.shape, 1) for m, p in self.begin.items()
        }
        self.leaves = {
            path: torch.zeros_like(part.core).requires_grad_() for path, part in self.begin.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return one `(p, q)` leaf a module."""
        return self.leaves

    def cores(self) -> dict[str, Tensor]:
        """Return each module's core."""
        return {m: self.begin[m].core + self.units[m] * leaf for m, leaf in self.leaves.items()}

    def parts(self) -> dict[str, Part]:
        """Return each module's change at the present values."""
        cores = self.cores()
        return {path: replace(part, core=cores[path]) for path, part in self.begin.items()}

    def learned(self) -> dict[str, Tensor]:
        """Return the fused change of every module, as method `icm_fusion` reads it."""
        with torch.no_grad():
            return _stored(self.parts(), self.terms)


@dataclass(frozen=True)
class LatentPlan(Plan):
    """A plan whose parameters are a latent.

    Attributes:
        model: The Fusion-VAE.
        point: Where it starts.
        constant: See `LatentParameters`.
    """

    model: FusionModel
    point: Point
    constant: Tensor | None

    def parameters(self) -> LatentParameters:
        """Return fresh parameters at their start."""
        return LatentParameters(self.model, self.terms, self.point, self.constant)


@dataclass(frozen=True)
class DirectPlan(Plan):
    """A plan whose parameters are the cores of a fused adapter.

    Attributes:
        parts: Where it starts.
    """

    parts: Mapping[str, Part]

    def parameters(self) -> DirectParameters:
        """Return fresh parameters at their start."""
        return DirectParameters(self.parts, self.terms)


def latent_plan(
    model: FusionModel,
    adapters: Sequence[Adapter],
    spec: LearnSpec = IN_CONTEXT,
    *,
    residual: bool = True,
    beneath: Mapping[str, LoRAFactors] | None = None,
) -> LatentPlan:
    """Return the plan that adapts the fused latent of some adapters, from F1 on.

    Args:
        model: A Fusion-VAE that knows the adapters.
        adapters: Any subset of its tasks.
        spec: What is minimised, and how the latent moves.
        residual: Start at the exact average, bent by the decoder, where the gauge is `core`.
        beneath: A fixed merge that is added, such as RegMean's; the latent then starts at it.

    Raises:
        InputError: the model does not know an adapter, or knows another one by its name.
        RecipeError: `beneath` with a model of factors.
    """
    if beneath is not None:
        check_beneath(model.layout.gauge)
    model.check_adapters({adapter.name: adapter.fingerprint for adapter in adapters})
    point = model.point([adapter.name for adapter in adapters])
    constant = None
    if beneath is not None:
        constant = -model.decoded(point.z, point.v)
    elif residual and model.layout.gauge == "core":
        constant = -model.decoded(point.z, point.v) + model.fused(point, residual=True)
        for adapter in sorted(adapters, key=lambda adapter: adapter.name):  # one order of the sum
            weight = point.weights[adapter.name]
            constant = constant + weight * model.layout.encode(adapter.modules)
    terms = own_terms(adapters)
    terms = terms if beneath is None else terms.with_residual(beneath)
    return LatentPlan(spec, terms, 0.0, model, point, constant)


def check_beneath(gauge: str) -> None:
    """Raise RecipeError where a latent could not leave a merge beneath it.

    What is decoded starts at zero there. Factors that are both zero have no gradient.
    """
    if gauge != "core":
        raise RecipeError(
            f"start.residual: a Fusion-VAE in gauge {gauge} but one in gauge core is expected to "
            "adapt above another merge. Train one with representation.gauge core."
        )


def direct_plan(
    adapters: Sequence[Adapter],
    parts: Mapping[str, Part],
    spec: LearnSpec = DIRECT,
    *,
    beneath: Mapping[str, LoRAFactors] | None = None,
) -> DirectPlan:
    """Return the plan that goes on with a fused adapter's own cores."""
    terms = own_terms(adapters)
    terms = terms if beneath is None else terms.with_residual(beneath)
    return DirectPlan(spec, terms, 0.0, parts)


@dataclass(frozen=True)
class Adaptation:
    """How a fused adapter is adapted in context.

    Attributes:
        latent: How the latent moves.
        direct: How the decoded LoRA moves afterwards; None: not.
        residual: See `latent_plan`.
        beneath: See `latent_plan`.
    """

    latent: LearnSpec = IN_CONTEXT
    direct: LearnSpec | None = DIRECT
    residual: bool = True
    beneath: Mapping[str, LoRAFactors] | None = None


def fuse_in_context(
    base: Base,
    tasks: Sequence[TaskInputs],
    model: FusionModel,
    how: Adaptation,
    *,
    run: Run | None = None,
    progress: Progress | None = None,
) -> LearnedMerge:
    """Adapt the fused latent on the tasks' unlabelled inputs, then the LoRA; in this process.

    Args:
        base: The frozen base.
        tasks: Adapters the model knows, and their inputs.
        model: The Fusion-VAE.
        how: Both stages.
        run: How the run is carried out.
        progress: Told about each step of each stage.

    Returns:
        Evidence for method `icm_fusion`; `report` is the last stage's, "latent" the first's.
    """

    def stage(plan: Plan, name: str) -> LearnedMerge:
        return learn(
            base.model, plan.learning(base), tasks, (run or Run()).of_stage(name), progress=progress
        )

    return in_stages(stage, model, [task.adapter for task in tasks], how)


def in_stages(
    stage: Callable[[Plan, str], LearnedMerge],
    model: FusionModel,
    adapters: Sequence[Adapter],
    how: Adaptation,
) -> LearnedMerge:
    """Return what both stages learn, whoever runs them; see `fuse_in_context`.

    Args:
        stage: Learns a plan, given the stage's name: "latent" or "direct".
        model: The Fusion-VAE.
        adapters: Adapters the model knows.
        how: Both stages.
    """
    origin = {"method": "icm_fusion", "latent": how.latent.model_dump()}
    plan = latent_plan(model, adapters, how.latent, residual=how.residual, beneath=how.beneath)
    first = stage(plan, "latent")
    if how.direct is None:
        return replace(first, origin=origin)
    then = direct_plan(adapters, parts_of(first.tensors), how.direct, beneath=how.beneath)
    last = stage(then, "direct")
    origin["direct"] = how.direct.model_dump()
    return replace(last, origin=origin, report={**last.report, "latent": first.report})


def parts_of(tensors: Mapping[str, Tensor]) -> dict[str, Part]:
    """Return each module's change of what was stored as evidence."""
    paths = sorted({name.removesuffix(".core") for name in tensors if name.endswith(".core")})
    return {p: Part(*(tensors[f"{p}.{end}"] for end in ("left", "core", "right"))) for p in paths}


def _free(part: Part) -> Part:
    """Return the same change as plain values around a full core."""
    core = part.core.detach()
    return Part(part.left.detach(), core.diag() if core.ndim == 1 else core, part.right.detach())


def _frames(parts: Mapping[str, Part], terms: Terms) -> dict[str, Frame]:
    return {
        path: Frame(
            part.left, part.right, terms.residual.get(path), terms.layouts.get(path, "linear")
        )
        for path, part in parts.items()
    }


def _stored(parts: Mapping[str, Part], terms: Terms) -> dict[str, Tensor]:
    stored = {}
    for path, part in parts.items():
        for name in ("left", "core", "right"):
            stored[f"{path}.{name}"] = getattr(part, name).detach().clone().contiguous()
        if path in terms.residual:
            stored[f"{path}.residual_a"] = terms.residual[path].a.contiguous()
            stored[f"{path}.residual_b"] = terms.residual[path].b.contiguous()
    return stored
