"""`jobs.finetune`: experts and their scores, a table without any merge."""

from pathlib import Path
from typing import Any

from icm_ray.config import FinetuneRecipe
from icm_ray.workflows.pipeline.run import run_table


def run(recipe: FinetuneRecipe, target: Path) -> dict[str, Any]:
    """Train every expert that is missing, and score all of them."""
    return run_table(recipe, target)
