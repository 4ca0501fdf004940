"""Fusion in context (F3): what moves, how, and what that depends on; a learner runs it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icm_ray.config import LearnSpec, changed
from icm_ray.errors import RecipeError
from icm_ray.evidence.learned import LearnedMerge
from icm_ray.files import MANIFEST, sha256_of_file
from icm_ray.fusion.latent import DIRECT, IN_CONTEXT, Adaptation, in_stages
from icm_ray.fusion.store import load_fusion
from icm_ray.learning.recipes import Plan
from icm_ray.types import Adapter

SHARED = (
    "reduction",
    "worst",
    "task_weights",
    "batch",
    "tasks_per_forward",
    "save_memory",
    "save_every",
)
"""What both stages take from a recipe; how far and fast each one moves is its own."""

OBJECTIVES = ("task_vector_match", "distillation")
"""What a latent may descend on: comparisons with the experts."""


def context_specs(
    depth: str | None, changes: Mapping[str, Any]
) -> tuple[LearnSpec, LearnSpec | None]:
    """Return how a latent moves, and then its cores if `depth` is "direct".

    Args:
        depth: "latent", "direct", or None for neither.
        changes: To how the latent moves; both stages minimise the same. Under "direct": to how
            the cores move after it.

    Raises:
        RecipeError: `changes` name what does not exist, or what a latent has not.
    """
    changes = dict(changes)
    then = changes.pop("direct", {})
    if then and depth != "direct":
        raise RecipeError("learn.direct: acts with in_context: direct, which is not set.")
    if shared := sorted({*then} & {*SHARED}):
        raise RecipeError(
            f"learn.direct: {', '.join(shared)}: the same in both stages. Set it in optimisation."
        )
    acts = {"residual", "residual_scale", "rho"}
    if set(changes.get("start", {})) - acts or "parameters" in changes:
        raise RecipeError(
            f"learn: in_context moves a latent; of start only {', '.join(sorted(acts))} act."
        )
    latent = changed(IN_CONTEXT, changes, "learn")
    if latent.objective.kind not in OBJECTIVES:
        raise RecipeError(
            f"learn.objective.kind: {latent.objective.kind!r} but in_context knows "
            f"{' and '.join(OBJECTIVES)}."
        )
    if depth != "direct":
        return latent, None
    same = {name: getattr(latent.optimisation, name) for name in SHARED}
    how = changed(DIRECT.optimisation.model_copy(update=same), then, "learn.direct")
    update = {"objective": latent.objective, "optimisation": how}
    return latent, DIRECT.model_copy(update=update)


@dataclass(frozen=True)
class Context:
    """A Fusion-VAE whose fused latent is learned in the place of a recipe's own parameters.

    Attributes:
        fusion: Folder of the Fusion-VAE.
        direct: How the decoded cores move after the latent; None: not.
    """

    fusion: Path
    direct: LearnSpec | None

    @property
    def identity(self) -> list[Any]:
        """What decides about the result, as plain data."""
        direct = self.direct.model_dump() if self.direct else None
        return [direct, sha256_of_file(self.fusion / MANIFEST)]

    def learn(
        self,
        stage: Callable[[Plan, str], LearnedMerge],
        plan: Plan,
        adapters: Sequence[Adapter],
    ) -> LearnedMerge:
        """Return what both stages learn; of the plan, its recipe and what lies beneath count."""
        how = Adaptation(plan.spec, self.direct, beneath=plan.terms.residual or None)
        return in_stages(stage, load_fusion(self.fusion), adapters, how)
