"""Recipe of a learned merge: what is learned, what is minimised, how it moves."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from icm_ray.config.fusion import InContext
from icm_ray.config.parts import Adapters, DataSpec, Part, Positive, Recipe
from icm_ray.config.places import EARLIER_OUTPUT
from icm_ray.kinds import SavedModulesPolicy


class ParametersSpec(Part):
    """What is learned between the adapters' fixed factors."""

    kind: Literal["coefficients", "cores", "factors"] = Field(
        default="coefficients",
        description="Numbers per task, a free matrix per module, or a LoRA that starts anew.",
    )
    sharing: Literal["module", "block", "adapter"] = Field(
        default="module", description="Modules that share their coefficients."
    )
    groups: Positive | Literal["rank"] = Field(
        default=1, description="Coefficients a task and module: runs of ranks, or one a rank."
    )
    link: Literal["raw", "clamp", "softplus", "sigmoid"] = "raw"
    extend: bool = Field(
        default=False, description="cores: let the bases span a residual's spaces too."
    )
    rank: Positive | Literal["largest", "sum"] = Field(
        default="largest", description="factors: of the new LoRA; words speak of the adapters'."
    )


ObjectiveKind = Literal[
    "null_space_ratio",
    "row_space_match",
    "task_vector_match",
    "entropy",
    "token_entropy",
    "distillation",
    "supervised",
]
"""Names in `learning.objectives.OBJECTIVES`."""


class ObjectiveSpec(Part):
    """What is minimised, and which module inputs it looks at."""

    kind: ObjectiveKind
    names: Literal["output", "all"] | list[str] = Field(
        default="output", description="Ends of target modules' paths; output is attention's."
    )
    blocks: list[int] | None = Field(default=None, description="None: the last share of them.")
    share: float = Field(default=0.25, gt=0, le=1)
    padding: bool = Field(default=False, description="Count padding, as the NSC authors' code.")
    skip_first: bool = Field(default=False, description="Leave out each text's first token.")
    heads: bool = Field(
        default=False, description="task_vector_match: look through the experts' heads too."
    )
    temperature: float = Field(
        default=1.0, gt=0, description="distillation: of class probabilities, both sides'."
    )
    unit: Literal["base", "larger"] = Field(
        default="base",
        description="distillation: a task's loss is a share of the base's, or of the larger of the "
        "base's and the start's, for tasks that the base does nearly as well as the expert.",
    )
    max_new_tokens: Positive = Field(default=1, description="token_entropy: longest answer.")
    reduction: Literal["mean", "sum"] = Field(
        default="mean", description="token_entropy: over an answer's positions."
    )


class StartSpec(Part):
    """Where learning starts."""

    value: float | Literal["1/K"] = Field(
        default="1/K", description="Multiplies every task's term; 0 leaves the residual alone."
    )
    basis: Literal["own", "tsv", "regmean"] = Field(
        default="own", description="Terms: the deltas, TSV's orthogonalised, RegMean's shares."
    )
    residual: str | None = Field(
        default=None,
        description="Fixed merge beneath: a method that learns nothing, or a merged adapter's "
        "folder.",
    )
    residual_scale: float = 1.0
    rho: float = Field(
        default=1.0, ge=0, le=1, description="regmean: factor of the Grams' off-diagonal entries."
    )


class OptimisationSpec(Part):
    """How the parameters move, and how a step's inputs are shared out."""

    steps: Positive = 100
    lr: float = Field(default=1e-3, gt=0)
    optimizer: Literal["adamw", "adam"] = "adamw"
    weight_decay: float = Field(default=0.01, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    reduction: Literal["mean", "sum"] = "mean"
    worst: float | None = Field(
        default=None, gt=0, description="Temperature of a smooth maximum over tasks."
    )
    task_weights: dict[str, float] | None = None
    batch: Positive = Field(default=8, description="Examples of each task a step.")
    tasks_per_forward: Positive = 1
    save_memory: bool = Field(default=False, description="Recompute blocks in the backward pass.")
    save_every: Positive = Field(default=50, description="Steps between saved states.")

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        done = step / self.steps
        if self.schedule == "linear":
            return self.lr * (1 - done)
        if self.schedule == "cosine":
            return self.lr * (1 + math.cos(math.pi * done)) / 2
        return self.lr

    def weights(self, tasks: Sequence[str]) -> dict[str, float]:
        """Return what each task's loss is multiplied by."""
        share = 1 / len(tasks) if self.reduction == "mean" else 1.0
        return {task: share * (self.task_weights or {}).get(task, 1.0) for task in tasks}


class LearnSpec(Part):
    """One learned merge: what is learned, what is minimised, where it starts, how it moves."""

    parameters: ParametersSpec = ParametersSpec()
    objective: ObjectiveSpec
    start: StartSpec = StartSpec()
    optimisation: OptimisationSpec = OptimisationSpec()


Overrides = Annotated[
    dict[str, dict[str, Any]],
    Field(
        description="Changes to the method's own learning recipe: part: {key: value}; of "
        "in_context, direct: {key: value} changes how the LoRA moves after the latent."
    ),
]


class LearnRecipe(Recipe):
    """Recipe of `jobs.learn`: what a learned method makes of K adapters and unlabelled inputs."""

    can_gather = True

    base: str
    revision: str | None = None
    adapters: Adapters
    method: str
    learn: Overrides = {}
    fusion: Annotated[str | None, EARLIER_OUTPUT] = Field(
        default=None, description="icm_fusion: folder of the Fusion-VAE that is adapted in context."
    )
    in_context: InContext = Field(
        default="direct", description="icm_fusion: adapt the fused latent; direct: then the LoRA."
    )
    data: DataSpec
    heads: Annotated[str | None, EARLIER_OUTPUT] = Field(
        default=None,
        description="Folder of experts whose heads objectives read; None: they lie with the "
        "adapters.",
    )
    modules_to_save: SavedModulesPolicy = "refuse"
    output: str = Field(min_length=1)
