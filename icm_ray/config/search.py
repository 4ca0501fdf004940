"""Recipe of `jobs.search`."""

from typing import Annotated, Any, Literal

from pydantic import Field

from icm_ray.config.fusion import FusionChanges
from icm_ray.config.learning import Overrides
from icm_ray.config.parts import DataSpec, Name, Part, Positive, ReadyAdapters, Recipe
from icm_ray.config.places import EARLIER_OUTPUT
from icm_ray.kinds import SavedModulesPolicy

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


class SearchedMethod(Part):
    """What is fixed, and what is searched."""

    method: str = "task_arithmetic"
    params: dict[str, Any] = {}
    rank: int | str | None = None
    learn: Overrides = {}
    fusion: FusionChanges = {}
    search: Searched = {}
    space: Literal["default"] | None = Field(
        default=None, description="default: the method's ready-made space beneath `search`."
    )


class SearchRow(SearchedMethod):
    """One search of a table, and a grid to compare with."""

    label: Name | None = None
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


class SearchRecipe(Recipe, SearchedMethod):
    """Recipe of `jobs.search`: parameters of merges, searched on Ray Tune with Optuna."""

    can_gather = True

    base: str
    revision: str | None = None
    suite: str | None = Field(default=None, description="Whose tasks merges are scored on.")
    experts: Annotated[str | None, EARLIER_OUTPUT] = Field(
        default=None,
        description="Folder of experts: heads, and the adapters if none are named. None: heads lie "
        "with the adapters.",
    )
    adapters: ReadyAdapters = []
    modules_to_save: SavedModulesPolicy = "refuse"
    data: DataSpec | None = Field(
        default=None, description="Unlabelled inputs of label-free objectives and learners."
    )
    trajectories: Annotated[str | None, EARLIER_OUTPUT] = Field(
        default=None, description="icm_fusion: folder of jobs.finetune with <task>/."
    )
    layer_groups: Positive = Field(default=3, description="Runs of blocks that share a number.")
    objectives: list[SearchObjective] = Field(default=["validation_mean"], min_length=1)
    validation: Positive | None = Field(
        default=None,
        description="Validation examples a task; None: 128, or all of a user's suite.",
    )
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

    @property
    def most(self) -> int:
        """Validation examples a task of a suite that comes with the package."""
        return self.validation or 128

    def row(self) -> SearchRow:
        """Return the recipe's own search as a row."""
        return SearchRow(**{name: getattr(self, name) for name in SearchedMethod.model_fields})
