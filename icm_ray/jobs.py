"""Every job by name: the class of its recipe, and the module that does it.

`python -m jobs.<name>` in a checkout and `icm-ray run <name>` anywhere are the same thing.
"""

from collections.abc import Mapping
from types import MappingProxyType

from icm_ray.command import Job
from icm_ray.config import (
    BenchmarkRecipe,
    EvaluateRecipe,
    EvidenceRecipe,
    FinetuneRecipe,
    LearnRecipe,
    MergeRecipe,
    PipelineRecipe,
    PrepareRecipe,
    SearchRecipe,
    TrainFusionRecipe,
)

_BASE = "icm_ray.workflows.plan"
"""Plans what runs a base."""

JOBS: Mapping[str, Job] = MappingProxyType(
    {
        "prepare": Job(PrepareRecipe, "icm_ray.workflows.prepare"),
        "finetune": Job(FinetuneRecipe, "icm_ray.workflows.finetune", _BASE),
        "evidence": Job(EvidenceRecipe, "icm_ray.workflows.evidence", _BASE),
        "learn": Job(LearnRecipe, "icm_ray.workflows.learn", _BASE),
        "train_fusion": Job(TrainFusionRecipe, "icm_ray.workflows.train_fusion", _BASE),
        "merge": Job(
            MergeRecipe,
            "icm_ray.workflows.merge",
            "icm_ray.merging.estimate",
            "icm_ray.merging.requirements",
        ),
        "search": Job(SearchRecipe, "icm_ray.workflows.search.run", _BASE),
        "evaluate": Job(EvaluateRecipe, "icm_ray.workflows.evaluate", _BASE),
        "pipeline": Job(PipelineRecipe, "icm_ray.workflows.pipeline.run", _BASE),
        "benchmark": Job(BenchmarkRecipe, "icm_ray.benchmarks.run"),
    }
)
