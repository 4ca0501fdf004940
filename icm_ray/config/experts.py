"""Recipes of bases and experts: fetched, trained and scored."""

from typing import Annotated, Literal

from pydantic import Field

from icm_ray.config.parts import SUITE, Adapters, Part, Positive, ReadyAdapters, Recipe
from icm_ray.config.places import EARLIER_OUTPUT


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
    targets: list[str] | str | None = Field(
        default=None, description="As PEFT reads them; None: PEFT's own for the model's type."
    )
    start: Annotated[str | None, EARLIER_OUTPUT] = Field(
        default=None,
        description="Folder of an adapter, such as a merge, that training goes on from; None: the "
        "change is zero at first.",
    )


class Training(Part):
    """How one expert is trained."""

    steps: Positive = 200
    batch: Positive = 32
    lora_lr: float = Field(default=5e-3, gt=0)
    head_lr: float = Field(default=5e-3, gt=0)
    train_examples: Positive = 4800
    checkpoints: Positive = Field(default=16, description="Kept of the trajectory, evenly spaced.")
    trajectory: Literal["second_half", "whole"] = Field(
        default="second_half",
        description="whole: from the untrained LoRA on, for curves; a Fusion-VAE learns of it all.",
    )
    save_every: Positive = Field(
        default=50, description="Steps between states a killed run resumes from."
    )
    tasks_per_forward: Positive = Field(
        default=1, description="Experts that one worker trains at once; on a CPU more save no time."
    )


class ExpertSet(Part):
    """One full set of experts: how A starts, and the seed of everything random."""

    init: Literal["shared", "own"] = "shared"
    seed: int = Field(default=0, ge=0)

    @property
    def label(self) -> str:
        """Name of the set in folders and tables."""
        return f"{self.init}-seed{self.seed}"


USUAL_SIZES = {"calibration": 128, "validation": 256, "test": 256}
"""Examples of a split of the suites that come with the package."""


def _usual(size: int) -> str:
    return f"None: {size} of a built-in suite, and all of a user's."


class Sizes(Part):
    """How many examples each split uses; the same first n for everybody."""

    calibration: Positive | None = Field(default=None, description=_usual(128))
    validation: Positive | None = Field(default=None, description=_usual(256))
    test: Positive | None = Field(default=None, description=_usual(256))
    tuning: Positive | None = Field(
        default=None, description="Validation examples that choose a setting; None: all of them."
    )

    def scored(self, split: str) -> int | None:
        """Return how many examples of a split merges are scored on."""
        return self.test if split == "test" else self.tuning or self.validation


class FinetuneRecipe(Recipe):
    """Recipe of `jobs.finetune`: K experts on one base."""

    can_evict = True

    suite: str = Field(default="text", description=SUITE)
    tasks: list[str] | None = Field(default=None, description="None: every task of the suite.")
    base: str | None = Field(default=None, description="None: the suite's own.")
    revision: str | None = None
    lora: LoRARecipe = LoRARecipe()
    training: Training = Training()
    sets: list[ExpertSet] = [ExpertSet()]
    sizes: Sizes = Sizes()
    dtype: Literal["float32", "float16"] = "float32"
    output: str = Field(min_length=1)


RealignHeads = Annotated[
    bool,
    Field(
        description="Also score with heads whose outputs are fitted to the experts' answers to "
        "the calibration inputs, the base beside them; the heads are written."
    ),
]


class EvaluateRecipe(Recipe):
    """Recipe of `jobs.evaluate`: score adapters on a suite's tasks against its experts."""

    can_evict = True

    suite: str = "text"
    experts: Annotated[Annotated[str, Field(min_length=1)] | ReadyAdapters, EARLIER_OUTPUT] = Field(
        description="Folder of jobs.finetune with one expert set, or the tasks' adapters by name."
    )
    base: str | None = None
    revision: str | None = None
    adapters: Adapters
    split: Literal["validation", "test"] = "test"
    examples: Positive | None = Field(default=None, description=_usual(256))
    batch: Positive = 64
    realign_heads: RealignHeads = False
    output: str = Field(min_length=1)
