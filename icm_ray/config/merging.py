"""Recipes of merging adapters, and of gathering what methods must know first."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from icm_ray.config.earlier import ASKED, OF_OUTPUT, with_earlier
from icm_ray.config.learning import Overrides
from icm_ray.config.parts import Adapters, DataSpec, Name, Output, Positive, Recipe
from icm_ray.config.places import EARLIER_OUTPUT, earlier_output
from icm_ray.errors import RecipeError
from icm_ray.kinds import SavedModulesPolicy


class MergeRecipe(Recipe):
    """Recipe of `icm-ray plan`, `icm-ray merge` and `jobs.merge`.

    What `earlier` and `remove` stand for is in the other keys once a recipe is read.
    """

    can_gather = True

    earlier: str | None = Field(
        default=None,
        description="Folder of a merge that kept its factors: merged again as then, with the "
        "adapters given here added.",
    )
    remove: list[Name] = Field(default=[], description="Adapters of `earlier` to leave out.")
    keep_factors: bool = Field(
        default=False,
        description="Keep copies of the adapters and their Gram statistics beside the merge, to "
        "add or remove adapters later.",
    )
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
    evidence: Annotated[str | None, EARLIER_OUTPUT] = None
    data: DataSpec | None = None
    learn: Overrides = {}
    modules_to_save: SavedModulesPolicy = "refuse"
    allow_pickle: bool = Field(
        default=False,
        description="Read adapter_model.bin: its weights alone, in a process of its own.",
    )
    output: Output

    @model_validator(mode="before")
    @classmethod
    def _with_earlier(cls, values: Any) -> Any:
        if not isinstance(values, dict) or values.get("earlier") is None:
            if isinstance(values, dict) and values.get("remove"):
                raise RecipeError("remove: without earlier. Name the merge that is meant.")
            return values
        if isinstance(merged := values["earlier"], str):
            values = {**values, "earlier": earlier_output(values.get("storage"), merged)}
        return with_earlier(values)

    @property
    def order(self) -> dict[str, Any]:
        """What is asked for whatever the adapters, as plain data; see `with_earlier`."""
        plain = self.model_dump(mode="json", include=set(ASKED), exclude_none=True)
        tasks = [ref.name for ref in self.adapters]
        if isinstance(weights := self.params.get("weights"), list):  # which would move to others
            plain["params"]["weights"] = dict(zip(tasks, weights, strict=True))
        if self.base and Path(self.base).is_dir():
            plain["base"] = str(Path(self.base).absolute())
        output = self.output.model_dump(include=set(OF_OUTPUT), exclude_none=True)
        return {**plain, "output": output, "adapters": tasks}


class EvidenceRecipe(Recipe):
    """Recipe of `jobs.evidence`: what methods and reports must know of K adapters and inputs."""

    can_evict = can_gather = True

    kind: Literal["task_vectors", "gram_statistics"] = Field(
        default="task_vectors",
        description="Task vectors and null-space ratios, or what regmean and esm need.",
    )
    base: str
    revision: str | None = None
    adapters: Adapters
    data: DataSpec
    again: bool = Field(
        default=False,
        description="gram_statistics: gathered once more, through RegMean's merge of the experts' "
        "own, which are kept in <output>.first.",
    )
    position: Literal["mean", "last"] = Field(
        default="mean",
        description="task_vectors: of the mean over an input's tokens, or of its last token.",
    )
    batch: Positive = 32
    modules_to_save: SavedModulesPolicy = "refuse"
    output: str = Field(min_length=1)

    @model_validator(mode="after")
    def _of_grams(self) -> "EvidenceRecipe":
        if self.again and self.kind != "gram_statistics":
            raise ValueError(f"again: of gram_statistics alone, but kind is {self.kind}")
        if self.position != "mean" and self.kind != "task_vectors":
            raise ValueError(f"position: of task_vectors alone, but kind is {self.kind}")
        if self.resources.grams != "full" and self.kind != "gram_statistics":
            raise ValueError(f"resources.grams: {self.resources.grams} but kind is {self.kind}")
        return self
