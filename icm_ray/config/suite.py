"""`suite.yaml`: a user's tasks, and where their data are."""

from typing import Annotated, Any, Literal

from pydantic import Field

from icm_ray.config.parts import Name, Part, Positive

TaskKind = Literal[
    "classification",
    "regression",
    "multiple_choice",
    "language_modelling",
    "generation",
    "dense_classification",
    "dense_regression",
    "detection",
]
Column = Annotated[str, Field(min_length=1, max_length=200)]
SplitName = Literal["train", "calibration", "validation", "test"]


class HubData(Part):
    """A data set of the Hugging Face hub; its own splits are its `split` column."""

    hub: str = Field(min_length=1, description="org/name, or a local folder of such files.")
    revision: str | None = Field(default=None, description="Commit, tag or branch.")
    config: str | None = Field(default=None, description="Name of a subset.")


class LmEvalData(Part):
    """A task of lm-eval: what it asks, and what is right."""

    lm_eval: str = Field(min_length=1, description="Its name, or a YAML file beside suite.yaml.")


class TaskFile(Part):
    """One task of a suite. What is left out is the usual: docs/your_data.md has the list."""

    kind: TaskKind
    data: str | HubData | LmEvalData | None = Field(
        default=None, description="Table beside suite.yaml; None: <task>.jsonl or .parquet."
    )
    where: dict[str, Any] = Field(default={}, description="Only rows with these values.")
    expert: Name | None = Field(
        default=None, description="The adapter's name in a recipe; None: the task's."
    )
    text: Column | None = None
    text_pair: Column | None = None
    image: Column | list[Column] | None = None
    prompt: str | None = Field(default=None, description="Template over columns: '{question}'.")
    chat: bool = Field(default=False, description="Read the prompt as one user turn of a chat.")
    messages: Column | None = Field(default=None, description="Column of turns: role, content.")
    choices: Column | None = None
    answer: Column | None = None
    document: Column | None = None
    split: Column | None = None
    classes: list[str] | None = Field(default=None, min_length=1)
    head: str | None = Field(default=None, description="adapter, names, or a head's file.")
    metric: str | None = None
    max_tokens: Positive | None = Field(default=None, description="None: the model's own, <= 2048.")
    max_new_tokens: Positive = 128
    splits: dict[SplitName, Annotated[int, Field(ge=0)] | Column] = {}
    source: str = ""
    licence: str = ""


class SuiteFile(Part):
    """The whole file."""

    base: str | None = Field(default=None, description="Folder or hub id; None: the adapters' own.")
    revision: str | None = None
    seed: int = Field(default=0, ge=0, description="Keys the draw of rows where no column says.")
    tasks: dict[Name, TaskFile] = Field(min_length=1)
