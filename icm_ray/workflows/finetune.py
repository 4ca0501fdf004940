"""`jobs.finetune`: experts and their scores."""

from pathlib import Path
from typing import Any

from icm_ray.config import FinetuneRecipe, PipelineRecipe
from icm_ray.workflows.pipeline.run import pipeline_and_report


def finetune_and_report(recipe: FinetuneRecipe, target: Path) -> dict[str, Any]:
    """Train experts and score them: a pipeline that merges nothing."""
    shared_fields = set(FinetuneRecipe.model_fields) & set(PipelineRecipe.model_fields)
    values_ = {name: getattr(recipe, name) for name in shared_fields}
    # The pipeline wants a method; experts alone are its table without any.
    order = PipelineRecipe.model_construct(**values_, name="experts", experts=None, methods=[])
    return pipeline_and_report(order, target)
