"""Recipe of `jobs.pipeline`: one table of methods over sets of experts."""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from icm_ray.config.experts import FinetuneRecipe
from icm_ray.config.fusion import FusionChanges, InContext
from icm_ray.config.learning import Overrides
from icm_ray.config.parts import Name, Part, Positive, ReadyAdapters


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


class PipelineRecipe(FinetuneRecipe):
    """Recipe of `jobs.pipeline`: prepare, finetune, evidence, merge, evaluate, report."""

    name: Name
    adapters: ReadyAdapters = []
    modules_to_save: Literal["refuse", "drop", "keep"] = Field(
        default="refuse", description="Of whole layers that are no task's head."
    )
    experts: str | None = Field(
        default=None, description="Ready experts of this very recipe, if any."
    )
    methods: list[MethodRow] = Field(min_length=1)
    tune: Literal["each set", "once an init"] = Field(
        default="each set",
        description="Choose settings for each set of experts, or with the first of each init.",
    )
