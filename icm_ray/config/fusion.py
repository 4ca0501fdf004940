"""Recipe of a Fusion-VAE: representation, network, losses, and the engine that trains it."""

from typing import Annotated, Any, Literal

from pydantic import Field

from icm_ray.config.parts import Adapters, DataSpec, Part, Positive, Recipe
from icm_ray.config.places import EARLIER_OUTPUT
from icm_ray.kinds import SavedModulesPolicy


class RepresentationSpec(Part):
    """How adapters become vectors for the Fusion-VAE."""

    gauge: Literal["core", "balanced", "raw"] = Field(
        default="core",
        description="Matrices between the finals' shared bases, evenly split factors, or factors "
        "as they are.",
    )
    components: Positive | None = Field(
        default=24,
        description="Principal directions kept of a module, the finals' span always among them; "
        "None: all numbers as they are.",
    )
    checkpoints: int | None = Field(
        default=None,
        ge=0,
        description="Of a task's trajectory, evenly spaced; the finished adapter is always there. "
        "None: all of them.",
    )
    task_vectors: Literal["own", "shuffled", "none"] = Field(
        default="own",
        description="What the network is told of a task; to see what it makes of it, the next "
        "task's vector, or zeros.",
    )


class VAESpec(Part):
    """The network of the Fusion-VAE."""

    preset: Literal["default", "conv", "paper"] = Field(
        default="default",
        description="Linear skip and residual a module, convolutions as in the predecessor, or "
        "the paper's plain encoder and decoder.",
    )
    latent: Positive = Field(
        default=16, description="Latent numbers: a module's in the default, else all there are."
    )
    hidden: Positive = 96
    residual: bool = Field(
        default=True, description="default: let a nonlinear part that sees v join the linear skip."
    )


InnerLoss = Literal["task", "reconstruction", "entropy", "null_space_ratio", "task_vector"]
"""Besides reconstruction: what rows of `learning.objectives.OBJECTIVES` call themselves here."""


class InnerSpec(Part):
    """The inner adaptation of Algorithm 1: the decoded LoRA descends through the frozen base."""

    loss: InnerLoss = Field(
        default="task_vector", description="Only reconstruction needs neither base nor inputs."
    )
    steps: Positive = 1
    lr: float = Field(default=0.01, gt=0, description="Length of a step over that of the LoRA.")
    relative: bool = Field(default=True, description="False: lr multiplies the plain gradient.")
    order: Literal[1, 2] = Field(
        default=1, description="2 differentiates the outer loss through the inner gradients too."
    )


class FusionSpec(Part):
    """One Fusion-VAE: its representation, network, losses and the two stages of its training.

    Steps `0 .. vae_steps - 1` fit the VAE alone, the `meta_steps` after them are Algorithm 1.
    """

    representation: RepresentationSpec = RepresentationSpec()
    vae: VAESpec = VAESpec()
    inner: InnerSpec = InnerSpec()
    vae_steps: int = Field(default=600, ge=0)
    meta_steps: int = Field(default=200, ge=0)
    batch: Positive = Field(default=16, description="Checkpoints of each task a step.")
    meta_batch: Positive = Field(default=1, description="Checkpoints of each task a meta step.")
    tasks_per_step: Positive | None = Field(default=None, description="None: every task.")
    mixtures: float = Field(
        default=0.5, ge=0, le=1, description="Share of a batch that mixes checkpoints of tasks."
    )
    lr: float = Field(default=1e-3, gt=0)
    meta_lr: float = Field(default=1e-4, gt=0)
    warm_up: float = Field(
        default=0.05, ge=0, le=1, description="Share of a stage in which its rate rises."
    )
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0, description="Largest norm of a step's gradient.")
    kl_weight: float = Field(default=1e-5, ge=0)
    kl_warm_up: float = Field(
        default=0.1, ge=0, le=1, description="Share of vae_steps in which kl_weight rises."
    )
    free_bits: float = Field(
        default=0.0, ge=0, description="Nats a latent dimension that cost nothing."
    )
    query: float = Field(
        default=0.0, ge=0, description="Weight of the inner loss after re-encoding, on new inputs."
    )
    strict: bool = Field(
        default=False, description="Algorithm 1 to the letter: line 11 decodes z, not z'."
    )
    save_every: Positive = 50

    @property
    def steps(self) -> int:
        """Steps of both stages."""
        return self.vae_steps + self.meta_steps


INPUT_BATCH = 16
"""Inputs of one inner step of a Fusion-VAE's training, unless a recipe says otherwise."""


FusionChanges = Annotated[
    dict[str, Any],
    Field(description="Changes to the Fusion-VAE's default recipe, as `fusion` of its own job."),
]


InContext = Literal["latent", "direct"]


class EngineSpec(Part):
    """How DeepSpeed trains the Fusion-VAE; `resources` says where."""

    zero_stage: Literal[0, 1, 2] = Field(
        default=1, description="0: every worker keeps the whole optimiser; 1, 2: its share of it."
    )
    accumulation: Positive = Field(
        default=1, description="Parts of a worker's tasks whose gradients are added up in a step."
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="bfloat16 is autocast; weights stay float32."
    )
    checkpoint_every: Positive = Field(default=50, description="Steps between checkpoints.")
    report_every: Positive = Field(default=25, description="Steps between lines of metrics.")
    max_failures: int = Field(default=3, ge=0, description="Lost workers until the job gives up.")


class TrainFusionRecipe(Recipe):
    """Recipe of `jobs.train_fusion`: a Fusion-VAE of K adapters and their trajectories."""

    base: str
    revision: str | None = None
    adapters: Adapters
    joins: Annotated[str | None, EARLIER_OUTPUT] = Field(
        default=None,
        description="Folder of a trained Fusion-VAE that takes the adapters in: nothing is "
        "trained. Latents are those of the finished adapters, with trajectories the means over "
        "their checkpoints too.",
    )
    trajectories: Annotated[str | None, EARLIER_OUTPUT] = Field(
        default=None, description="Folder of jobs.finetune with <task>/; None: the adapters alone."
    )
    data: DataSpec
    heads: Annotated[str | None, EARLIER_OUTPUT] = Field(
        default=None,
        description="Folder of experts, for inner losses that read heads; None: they lie with the "
        "adapters.",
    )
    fusion: FusionSpec = FusionSpec()
    input_batch: Positive = Field(default=INPUT_BATCH, description="Inputs of one inner step.")
    engine: EngineSpec = EngineSpec()
    modules_to_save: SavedModulesPolicy = "refuse"
    output: str = Field(min_length=1)
