"""Recipe of `jobs.pipeline`: one table of methods over sets of experts."""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from icm_ray.config.experts import FinetuneRecipe, RealignHeads
from icm_ray.config.fusion import EngineSpec, FusionChanges, InContext
from icm_ray.config.learning import Overrides
from icm_ray.config.parts import Name, Part, Positive, ReadyAdapters, Resources
from icm_ray.config.places import EARLIER_OUTPUT
from icm_ray.config.search import Searched
from icm_ray.kinds import RANDOM, CutMetric


def _setting(value: float | str) -> float | str:
    """Refuse words that are meant as numbers, or could be no folder's name."""
    if isinstance(value, str) and not re.fullmatch(r"[A-Za-z_-]+", value):
        raise ValueError("a number such as 0.5 or 1.0e-3, or a word such as soup, is expected.")
    return value


class MethodRow(Part):
    """One row of a results table: a method, its parameters and what may be tuned."""

    label: Name | None = None
    method: str
    params: dict[str, Any] = {}
    rank: int | str | None = None
    metric: CutMetric | None = Field(
        default=None, description="What a cut to the rank keeps most of; see `output.metric`."
    )
    tasks: list[str] | None = Field(
        default=None,
        min_length=1,
        description="Experts to merge, for scores on unseen tasks too; None: all.",
    )
    random: bool = Field(
        default=False,
        description="A control: merge random adapters of the experts' shapes and singular values "
        f"in their place, under the label with {RANDOM} at its end; for methods without data.",
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
    split: Literal["calibration", "train"] = Field(
        default="calibration",
        description="What they are of; train is what experts saw, for controls.",
    )
    grid: dict[str, list[Annotated[float | str, AfterValidator(_setting)]]] = Field(
        default={}, description="Tried on validation data only."
    )
    search: Searched = Field(
        default={},
        description="Parameters and weights that Ray Tune searches on validation data instead.",
    )
    trials: Positive = Field(default=12, description="Of `search`.")

    @property
    def name(self) -> str:
        """Label of the row, the method's name unless given, marked where it is a control."""
        return f"{self.label or self.method}{RANDOM if self.random else ''}"


class Budget(Part):
    """How long a pipeline may try methods: the smallest of what is set."""

    minutes: float | None = Field(default=None, gt=0, description="Of the clock.")
    cpu_hours: float | None = Field(default=None, gt=0, description="CPUs held, times hours.")
    gpu_hours: float | None = Field(default=None, gt=0, description="GPUs held, times hours.")

    def seconds(self, workers: int, resources: Resources) -> float:
        """Return how long `workers` of these resources may run side by side."""
        held = [
            (self.cpu_hours, workers * resources.cpus_per_worker),
            (self.gpu_hours, workers * resources.gpus_per_worker),
        ]
        limits = [3600 * hours / amount for hours, amount in held if hours and amount]
        return min([*limits, 60 * self.minutes if self.minutes else math.inf])


class PipelineRecipe(FinetuneRecipe):
    """Recipe of `jobs.pipeline`: prepare, finetune, evidence, merge, evaluate, report."""

    can_gather = True

    name: Name
    adapters: ReadyAdapters = []
    modules_to_save: Literal["refuse", "drop", "keep"] = Field(
        default="refuse", description="Of whole layers that are no task's head."
    )
    experts: Annotated[str | None, EARLIER_OUTPUT] = Field(
        default=None, description="Ready experts of this very recipe, if any."
    )
    methods: list[MethodRow] | None = Field(
        default=None,
        min_length=1,
        description="None: all that give one adapter and that the data allow, cheapest first.",
    )
    budget: Budget | None = Field(
        default=None, description="What methods that were not named may cost together."
    )
    engine: EngineSpec | None = Field(
        default=None,
        description="How DeepSpeed trains the rows' Fusion-VAEs; None: each whole in one task.",
    )
    realign_heads: RealignHeads = False
    tune: Literal["each set", "once an init"] = Field(
        default="each set",
        description="Choose settings for each set of experts, or with the first of each init.",
    )
