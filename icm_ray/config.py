"""What a recipe may say: one class a job, no unknown keys, every range checked.

`recipe_files.load_recipe` reads them from YAML. Relative paths are relative to the folder the
command runs in.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from icm_ray.errors import RecipeError
from icm_ray.types import SavedModulesPolicy

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
Positive = Annotated[int, Field(gt=0)]


def _setting(value: float | str) -> float | str:
    """Refuse words that are meant as numbers, or could be no folder's name."""
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z_-]+", value):
        raise ValueError("a number such as 0.5 or 1.0e-3, or a word such as soup, is expected.")
    return value


class Part(BaseModel):
    """Base of all recipe parts: no unknown keys, no silent conversions, no changes later."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


Spec = TypeVar("Spec", bound=Part)


def changed(spec: Spec, changes: Mapping[str, Any], where: str) -> Spec:
    """Return a part of a recipe with changes, parts within parts; `where` names it in errors.

    Raises:
        RecipeError: changes name what does not exist, or a value is out of range.
    """
    try:
        return type(spec).model_validate(_laid_over(spec.model_dump(), changes))
    except ValidationError as error:
        lines = [f"{where}.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise RecipeError(lines) from None


def _laid_over(plain: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(plain)
    for name, value in changes.items():
        inside = found.get(name)
        both = isinstance(inside, Mapping) and isinstance(value, Mapping)
        found[name] = _laid_over(inside, value) if both else value  # type: ignore[arg-type]
    return found


class Resources(Part):
    """What each actor or worker gets, and how the arithmetic is done on it."""

    workers: Positive | None = Field(
        default=None, description="At most so many; None: as the CPUs allow."
    )
    cpus_per_worker: float = Field(default=1.0, ge=0)
    gpus_per_worker: float = Field(default=0.0, ge=0, description="May be a fraction.")
    memory_per_worker: Positive | None = Field(default=None, description="Bytes to reserve.")
    custom: dict[str, float] = Field(default={}, description="Custom Ray resources, name: amount.")
    threads: Positive = Field(
        default=1, description="Kernel threads; part of what makes bytes equal."
    )
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?|mps|xpu)$")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    backend: Literal["gloo", "nccl"] = "gloo"
    timeout_seconds: Positive = Field(
        default=1800, description="Longest wait for one piece of work."
    )


class AdapterRef(Part):
    """One adapter of a merge: a name that is its task's, and a PEFT folder."""

    name: Name
    path: str = Field(min_length=1)


class DataSpec(Part):
    """Which inputs methods that gather evidence may see."""

    suite: str | None = Field(default=None, description="A name in SUITES.")
    path: str | None = Field(
        default=None, description="Folder with <task>.jsonl or <task>.parquet."
    )
    split: str = "calibration"
    inputs_per_task: Positive = 64


class Output(Part):
    """Where the merged adapter goes and in which form."""

    path: str = Field(min_length=1)
    rank: int | str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


class Recipe(Part):
    """What every job's recipe has."""

    storage: str | None = Field(default=None, description="Folder that relative outputs are in.")
    resources: Resources = Resources()
    seed: int = Field(default=0, ge=0)
    cache: str | None = Field(
        default=None, description="Where bases are kept; default ICM_RAY_CACHE."
    )

    @property
    def output_path(self) -> str:
        """The recipe's output folder as written, relative to the storage root."""
        output = getattr(self, "output")  # noqa: B009 - declared by the subclasses
        return output.path if isinstance(output, Output) else output


class ParametersSpec(Part):
    """What is learned between the adapters' fixed factors."""

    kind: Literal["coefficients", "cores"] = Field(
        default="coefficients", description="Numbers per task, or a free matrix per module."
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


class ObjectiveSpec(Part):
    """What is minimised, and which module inputs it looks at."""

    kind: Literal[
        "null_space_ratio",
        "row_space_match",
        "task_vector_match",
        "entropy",
        "token_entropy",
        "distillation",
        "supervised",
    ]
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
        default=None, description="Fixed merge beneath: 'regmean', or a merged adapter's folder."
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
    save_every: Positive = 50


class LearnSpec(Part):
    """One learned merge: what is learned, what is minimised, where it starts, how it moves."""

    parameters: ParametersSpec = ParametersSpec()
    objective: ObjectiveSpec
    start: StartSpec = StartSpec()
    optimisation: OptimisationSpec = OptimisationSpec()


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


class InnerSpec(Part):
    """The inner adaptation of Algorithm 1: the decoded LoRA descends through the frozen base."""

    loss: Literal["task", "reconstruction", "entropy", "null_space_ratio", "task_vector"] = Field(
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


Overrides = Annotated[
    dict[str, dict[str, Any]],
    Field(
        description="Changes to the method's own learning recipe: part: {key: value}; of "
        "in_context, direct: {key: value} changes how the LoRA moves after the latent."
    ),
]


INPUT_BATCH = 16
"""Inputs of one inner step of a Fusion-VAE's training, unless a recipe says otherwise."""
FusionChanges = Annotated[
    dict[str, Any],
    Field(description="Changes to the Fusion-VAE's default recipe, as `fusion` of its own job."),
]


InContext = Literal["latent", "direct"]


class LearnRecipe(Recipe):
    """Recipe of `jobs.learn`: what a learned method makes of K adapters and unlabelled inputs."""

    base: str
    revision: str | None = None
    adapters: list[AdapterRef] = Field(min_length=1)
    method: str
    learn: Overrides = {}
    fusion: str | None = Field(
        default=None, description="icm_fusion: folder of the Fusion-VAE that is adapted in context."
    )
    in_context: InContext = Field(
        default="direct", description="icm_fusion: adapt the fused latent; direct: then the LoRA."
    )
    data: DataSpec
    heads: str | None = Field(
        default=None, description="Folder of experts whose heads objectives may read."
    )
    modules_to_save: SavedModulesPolicy = "refuse"
    output: str = Field(min_length=1)


class MergeRecipe(Recipe):
    """Recipe of `icm-ray plan`, `icm-ray merge` and `jobs.merge`."""

    base: str | None = Field(
        default=None, description="Alias, folder or hub id; optional if data-free."
    )
    revision: str | None = None
    adapters: list[AdapterRef] = Field(min_length=1, max_length=10_000)
    method: str
    params: dict[str, Any] = {}
    evidence: str | None = None
    data: DataSpec | None = None
    learn: Overrides = {}
    modules_to_save: SavedModulesPolicy = "refuse"
    output: Output


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
    adapters: list[AdapterRef] = Field(min_length=1)
    joins: str | None = Field(
        default=None,
        description="Folder of a trained Fusion-VAE that takes the adapters in: nothing is "
        "trained. Latents are those of the finished adapters, with trajectories the means over "
        "their checkpoints too.",
    )
    trajectories: str | None = Field(
        default=None, description="Folder of jobs.finetune with <task>/; None: the adapters alone."
    )
    data: DataSpec
    heads: str | None = Field(
        default=None, description="Folder of experts, for inner losses that read heads."
    )
    fusion: FusionSpec = FusionSpec()
    input_batch: Positive = Field(default=INPUT_BATCH, description="Inputs of one inner step.")
    engine: EngineSpec = EngineSpec()
    modules_to_save: SavedModulesPolicy = "refuse"
    output: str = Field(min_length=1)


class PrepareRecipe(Recipe):
    """Recipe of `jobs.prepare`: fetch a suite's base and data once."""

    suite: str | None = "text"
    base: str | None = None
    revision: str | None = None
    output: str = "runs/prepare"


class LoRARecipe(Part):
    """Shape of the adapters that `jobs.finetune` trains."""

    rank: Positive = 8
    alpha: Positive = 16
    targets: list[str] | str = ["query", "key", "value", "attention.output.dense"]


class Training(Part):
    """How one expert is trained."""

    steps: Positive = 200
    batch: Positive = 32
    lora_lr: float = Field(default=5e-3, gt=0)
    head_lr: float = Field(default=5e-3, gt=0)
    train_examples: Positive = 4800
    checkpoints: Positive = Field(
        default=16, description="Kept from the second half, evenly spaced."
    )
    save_every: Positive = Field(
        default=50, description="Steps between states a killed run resumes from."
    )


class ExpertSet(Part):
    """One full set of experts: how A starts, and the seed of everything random."""

    init: Literal["shared", "own"] = "shared"
    seed: int = Field(default=0, ge=0)

    @property
    def label(self) -> str:
        """Name of the set in folders and tables."""
        return f"{self.init}-seed{self.seed}"


class Sizes(Part):
    """How many examples each split uses; the same first n for everybody."""

    calibration: Positive = 128
    validation: Positive = 256
    test: Positive = 256
    tuning: Positive | None = Field(
        default=None, description="Validation examples that choose a setting; None: all of them."
    )

    def scored(self, split: str) -> int:
        """Return how many examples of a split merges are scored on."""
        return self.test if split == "test" else self.tuning or self.validation


class FinetuneRecipe(Recipe):
    """Recipe of `jobs.finetune`: K experts on one base."""

    suite: str = "text"
    tasks: list[str] | None = Field(default=None, description="None: every task of the suite.")
    base: str | None = Field(default=None, description="None: the suite's own.")
    revision: str | None = None
    lora: LoRARecipe = LoRARecipe()
    training: Training = Training()
    sets: list[ExpertSet] = [ExpertSet()]
    sizes: Sizes = Sizes()
    dtype: Literal["float32", "float16"] = "float32"
    output: str = Field(min_length=1)


class EvidenceRecipe(Recipe):
    """Recipe of `jobs.evidence`: what methods and reports must know of K adapters and inputs."""

    kind: Literal["task_vectors", "gram_statistics"] = Field(
        default="task_vectors",
        description="Task vectors and null-space ratios, or what regmean needs.",
    )
    base: str
    revision: str | None = None
    adapters: list[AdapterRef] = Field(min_length=1)
    data: DataSpec
    batch: Positive = 32
    modules_to_save: SavedModulesPolicy = "refuse"
    output: str = Field(min_length=1)


class EvaluateRecipe(Recipe):
    """Recipe of `jobs.evaluate`: score adapters on a suite's tasks against its experts."""

    suite: str = "text"
    experts: str = Field(min_length=1, description="Folder of one expert set.")
    base: str | None = None
    revision: str | None = None
    adapters: list[AdapterRef] = Field(min_length=1)
    split: Literal["validation", "test"] = "test"
    examples: Positive = 256
    batch: Positive = 64
    output: str = Field(min_length=1)


class MethodRow(Part):
    """One row of a results table: a method, its parameters and what may be tuned."""

    label: Name | None = None
    method: str
    params: dict[str, Any] = {}
    rank: int | str | None = None
    tasks: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Experts to merge, for scores on unseen tasks too; None: all.",
    )
    learn: Overrides = {}
    fusion: FusionChanges = {}
    in_context: InContext | None = Field(
        default=None,
        description="icm_fusion: adapt the fused latent on inputs; direct: then the LoRA too.",
    )
    inputs: Positive | None = Field(
        default=None, description="Inputs a task to learn from; None: sizes.calibration."
    )
    grid: dict[str, list[Annotated[float | str, AfterValidator(_setting)]]] = Field(
        default={}, description="Tried on validation data only."
    )

    @property
    def name(self) -> str:
        """Label of the row; the method's name unless given."""
        return self.label or self.method


class PipelineRecipe(Recipe):
    """Recipe of `jobs.pipeline`: prepare, finetune, evidence, merge, evaluate, report."""

    name: Name
    suite: str = "text"
    base: str | None = None
    revision: str | None = None
    tasks: list[str] | None = None
    lora: LoRARecipe = LoRARecipe()
    training: Training = Training()
    sets: list[ExpertSet] = [ExpertSet()]
    sizes: Sizes = Sizes()
    dtype: Literal["float32", "float16"] = "float32"
    experts: str | None = Field(
        default=None, description="Ready experts of this very recipe, if any."
    )
    methods: list[MethodRow] = Field(min_length=1)
    tune: Literal["each set", "once an init"] = Field(
        default="each set",
        description="Choose settings for each set of experts, or with the first of each init.",
    )
    output: str = Field(min_length=1)


Shape = Annotated[list[Positive], Field(min_length=2, max_length=2)]
"""`[d_out, d_in]` of a weight."""


class StepsBenchmark(Part):
    """One comparison of learning steps: ours beside the straightforward loop."""

    label: str
    model: dict[str, Any] = Field(description="Config of a base with random weights.")
    objective: ObjectiveSpec
    targets: list[str] = Field(description="Ends of the paths of adapted modules.")
    tokens: list[Positive] = [64]
    adapters: list[Positive] = [6]
    batch: Positive = 1
    tasks_per_forward: Positive = 1
    repeats: Positive = 3
    goal: str = ""


class FusionBenchmark(Part):
    """One size at which a Fusion-VAE's step is timed beside the predecessor's network."""

    label: str
    layers: dict[str, Shape] = Field(min_length=1)
    copies: Positive = Field(default=1, description="So many times `layers`.")
    rank: Positive = 8
    repeats: Positive = 3
    goal: str = ""


class BenchmarkRecipe(Recipe):
    """Recipe of `jobs.benchmark`: ours and peers side by side, and memory over many adapters."""

    methods: list[str] = Field(
        default=["cat", "svd"], description="Names in COMPARISONS: ours beside PEFT's, or a naive."
    )
    layers: dict[str, Shape] = {"q_proj": [4096, 4096], "v_proj": [1024, 4096]}
    adapters: Positive = 6
    rank: Positive = 16
    repeats: Positive = 9
    peft_repeats: dict[str, Positive] = Field(
        default={"svd": 1}, description="Calls of the peer, where it is slow."
    )
    whole_model: int = Field(
        default=0, ge=0, description="So many times `layers`, read and merged by svd."
    )
    many: list[Positive] = Field(
        default=[], description="Numbers of adapters whose memory is compared."
    )
    many_methods: list[MethodRow] = [MethodRow(method="svd", rank=16)]
    many_shape: Shape = [1024, 1024]
    many_modules: Positive = 24
    learning: list[StepsBenchmark] = Field(
        default=[], description="Learning steps beside the straightforward loop."
    )
    fusion: list[FusionBenchmark] = Field(
        default=[], description="A Fusion-VAE's steps beside the predecessor's network."
    )
    output: str = Field(min_length=1)


Searched = Annotated[
    dict[str, str | list[Any]],
    Field(description="By name: a distribution such as loguniform(0.05, 2), or a list of choices."),
]
SearchObjective = Literal[
    "validation_mean",
    "validation_worst",
    "null_space_ratio",
    "row_space_match",
    "task_vector_match",
    "entropy",
    "output_rank",
    "output_bytes",
    "reconstruction_error",
    "kl_total",
]


class SearchRow(Part):
    """One search: what is fixed, what is searched, and a grid to compare with."""

    label: Name | None = None
    method: str = "task_arithmetic"
    params: dict[str, Any] = {}
    rank: int | str | None = None
    learn: Overrides = {}
    fusion: FusionChanges = {}
    search: Searched = {}
    space: Literal["default"] | None = Field(
        default=None, description="default: the method's ready-made space beneath `search`."
    )
    grid: dict[str, list[float]] = Field(
        default={}, description="By searched name: values that are tried as they are, first."
    )

    @property
    def name(self) -> str:
        """Label of the row; the method's name unless given."""
        return self.label or self.method


class Halving(Part):
    """Successive halving (ASHA): most trials are stopped early, on part of the evidence."""

    by: Literal["examples", "steps"] = Field(
        default="examples", description="Examples a task, or steps of a learner."
    )
    first: Positive = Field(default=32, description="Looked at before any trial is stopped.")
    factor: int = Field(default=2, ge=2, description="One of so many goes on, so many times on.")


class SearchRecipe(Recipe):
    """Recipe of `jobs.search`: parameters of merges, searched on Ray Tune with Optuna."""

    base: str
    revision: str | None = None
    suite: str | None = Field(default=None, description="Whose tasks merges are scored on.")
    experts: str | None = Field(
        default=None, description="Folder of experts: heads, and the adapters if none are named."
    )
    adapters: list[AdapterRef] = []
    modules_to_save: SavedModulesPolicy = "refuse"
    data: DataSpec | None = Field(
        default=None, description="Unlabelled inputs of label-free objectives and learners."
    )
    method: str = "task_arithmetic"
    params: dict[str, Any] = {}
    rank: int | str | None = None
    learn: Overrides = {}
    fusion: FusionChanges = {}
    trajectories: str | None = Field(
        default=None, description="icm_fusion: folder of jobs.finetune with <task>/."
    )
    search: Searched = {}
    space: Literal["default"] | None = None
    layer_groups: Positive = Field(default=3, description="Runs of blocks that share a number.")
    objectives: list[SearchObjective] = Field(default=["validation_mean"], min_length=1)
    validation: Positive = Field(default=128, description="Validation examples a task.")
    test: Positive | None = Field(
        default=None, description="Test examples a task that the best is scored on, once."
    )
    trials: Positive = 30
    sampler: Literal["tpe", "gp", "random"] = "tpe"
    startup: Positive = Field(default=10, description="Trials at random before the sampler looks.")
    start: list[str | dict[str, Any]] = Field(
        default=["default"],
        description="Points tried first: default, uniform, {name: value}, an earlier search's "
        "output, or a folder of learned coefficients.",
    )
    halving: Halving | None = None
    loggers: list[Literal["tensorboard", "wandb", "mlflow"]] = []
    rows: list[SearchRow] = Field(
        default=[], description="Several searches for one table; replace method, search and so on."
    )
    seeds: list[int] = Field(default=[], description="Seeds of the searches; empty: `seed` alone.")
    output: str = Field(min_length=1)

    def row(self) -> SearchRow:
        """Return the recipe's own search as a row."""
        names = ("method", "params", "rank", "learn", "fusion", "search", "space")
        return SearchRow(**{name: getattr(self, name) for name in names})
