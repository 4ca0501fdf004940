"""Recipes of merging adapters, and of gathering what methods must know first."""

from typing import Any, Literal

from pydantic import Field

from icm_ray.config.learning import Overrides
from icm_ray.config.parts import Adapters, DataSpec, Output, Positive, Recipe
from icm_ray.types import SavedModulesPolicy


class MergeRecipe(Recipe):
    """Recipe of `icm-ray plan`, `icm-ray merge` and `jobs.merge`."""

    base: str | None = Field(
        default=None, description="Alias, folder or hub id; optional if data-free."
    )
    revision: str | None = None
    same_base: bool = Field(
        default=False, description="The adapters' bases are one model under several names."
    )
    adapters: Adapters
    method: str
    params: dict[str, Any] = {}
    evidence: str | None = None
    data: DataSpec | None = None
    learn: Overrides = {}
    modules_to_save: SavedModulesPolicy = "refuse"
    allow_pickle: bool = Field(
        default=False,
        description="Read adapter_model.bin: its weights alone, in a process of its own.",
    )
    output: Output


class EvidenceRecipe(Recipe):
    """Recipe of `jobs.evidence`: what methods and reports must know of K adapters and inputs."""

    kind: Literal["task_vectors", "gram_statistics"] = Field(
        default="task_vectors",
        description="Task vectors and null-space ratios, or what regmean needs.",
    )
    base: str
    revision: str | None = None
    adapters: Adapters
    data: DataSpec
    batch: Positive = 32
    modules_to_save: SavedModulesPolicy = "refuse"
    output: str = Field(min_length=1)
