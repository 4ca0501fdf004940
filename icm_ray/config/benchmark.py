"""Recipe of `jobs.benchmark`."""

from typing import Annotated, Any, Literal

from pydantic import Field

from icm_ray.config.learning import ObjectiveSpec
from icm_ray.config.parts import Part, Positive, Recipe
from icm_ray.config.pipeline import MethodRow

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


class CommandBenchmark(Part):
    """Whole `icm-ray merge` and `icm-ray plan` commands, as a user starts them."""

    label: str
    layers: dict[str, Shape] = Field(min_length=1)
    copies: Positive = Field(default=1, description="So many times `layers`.")
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    method: str = "svd"
    alone: bool = Field(
        default=True, description="Time its stages, reading, arithmetic and writing apart, too."
    )
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
    commands: list[CommandBenchmark] = Field(
        default=[], description="Whole commands beside what they cannot do without."
    )
    output: str = Field(min_length=1)
