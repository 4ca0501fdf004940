"""Write the JSON Schemas of what goes in (recipe) and what comes out (report, results).

    python docs/schemas/generate.py

Run it after a change of a recipe or report; a test compares the files with what it would write.
"""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt

from icm_ray.config import MergeRecipe, SuiteFile

FOLDER = Path(__file__).parent
DIALECT = "https://json-schema.org/draft/2020-12/schema"
Digest = Field(pattern="^[0-9a-f]{64}$")


class Strict(BaseModel):
    """No keys beyond the described ones."""

    model_config = ConfigDict(extra="forbid")


class ModuleEntry(Strict):
    """What happened to one module; norms are Frobenius norms of deltas."""

    rank: NonNegativeInt = Field(description="Rank written out.")
    exact_rank: NonNegativeInt = Field(description="Rank before the final cut.")
    input_norms: dict[str, NonNegativeFloat] = Field(description="By task that has the module.")
    output_norm: NonNegativeFloat
    retained_energy: float = Field(ge=0, le=1, description="Share of the squared norm kept.")
    truncation_error: float = Field(ge=0, le=1, description="sqrt(1 - retained_energy)")
    absent: list[str] = Field(description="Tasks without this module; they count as no change.")
    cut: Literal["none", "exact", "randomised"] = Field(description="How the rank was reached.")
    task_energy: dict[str, float] = Field(
        description="What the cut kept of each task's own change, for methods that make them."
    )
    seen_energy: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Share of what the result adds to outputs, squared over the inputs, that the "
        "cut kept; null without Gram statistics, or if nothing was cut.",
    )


class TaskEntry(Strict):
    """One task's own adapter in `per_task/`."""

    fingerprint: str = Digest
    retained_energy: float = Field(ge=0, le=1, description="Share of the squared norm kept.")


class MergeReportFile(Strict):
    """`merge_report.json` of a merged adapter: everything needed to repeat and to judge it."""

    method: str = Field(description="A name in METHODS.")
    formula: str = Field(description="The result in one line.")
    params: dict[str, Any] = Field(description="Every parameter, defaults included.")
    seed: NonNegativeInt
    output_rank: int | str | None = Field(description="As asked for; null: the method's default.")
    inputs: dict[str, str] = Field(description="sha256 of each adapter's factors, by task.")
    modules: dict[str, ModuleEntry] = Field(description="By the module's path in the base.")
    evidence: str | None = Field(description="sha256 of the evidence; null without any.")
    per_task: dict[str, TaskEntry] = Field(
        description="Adapters in per_task/<task>/; empty for methods that make one for all."
    )
    retained_energy: float = Field(ge=0, le=1, description="Over all modules together.")
    output_metric: Literal["inputs", "weights"] = Field(
        default="weights", description="What a cut kept most of."
    )
    seen_energy: float | None = Field(
        default=None, ge=0, le=1, description="Mean over modules; null if unknown."
    )
    fingerprint: str = Digest
    dtype: Literal["float64", "float32", "float16", "bfloat16"]
    modules_to_save: Literal["refuse", "drop", "keep", "mean"] = Field(
        description="Policy of the recipe."
    )
    saved_modules: dict[str, list[str]] = Field(
        description="Tensors kept in saved_modules/<task>.safetensors, by task."
    )
    evicted: dict[str, str] = Field(
        default={}, description="Adapters it was meant to be of, each with what kept it out."
    )


class ResultsFile(BaseModel):
    """`results.json` of a job; further keys depend on the job."""

    model_config = ConfigDict(extra="allow")
    status: Literal["done", "failed"]
    exit_code: Literal[0, 1, 2, 3, 4, 5, 130, 143] = Field(
        description="0 done; 1 a bug; 2 recipe or command line; 3 input; 4 disk or memory; "
        "5 cluster; 130, 143 interrupted."
    )
    problems: list[str] = Field(description="One line each; empty after success.")
    outputs: dict[str, Any] = Field(description="Paths of what was made, by kind.")
    scores: dict[str, Any] = Field(description="Scores, by adapter or table row.")


FILES: dict[str, type[BaseModel]] = {
    "merge_recipe": MergeRecipe,
    "merge_report": MergeReportFile,
    "results": ResultsFile,
    "suite": SuiteFile,
}


def texts() -> dict[str, str]:
    """Return the content of every schema file by file name."""
    return {
        f"{name}.schema.json": json.dumps(
            {"$schema": DIALECT, **model.model_json_schema()}, indent=2, sort_keys=True
        )
        + "\n"
        for name, model in FILES.items()
    }


if __name__ == "__main__":
    for name, text in texts().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(FOLDER / name)
