"""What a recipe may say: one class a job, no unknown keys, every range checked.

`loading.load_recipe` reads them from YAML. Relative paths are relative to the folder the command
runs in. One file for each reader: what merges, learns, trains, searches or measures.
"""

from icm_ray.config.benchmark import BenchmarkRecipe, FusionBenchmark, Shape, StepsBenchmark
from icm_ray.config.experts import (
    EvaluateRecipe,
    ExpertSet,
    FinetuneRecipe,
    LoRARecipe,
    PrepareRecipe,
    Sizes,
    Training,
)
from icm_ray.config.fusion import (
    INPUT_BATCH,
    EngineSpec,
    FusionChanges,
    FusionSpec,
    InContext,
    InnerSpec,
    RepresentationSpec,
    TrainFusionRecipe,
    VAESpec,
)
from icm_ray.config.learning import (
    LearnRecipe,
    LearnSpec,
    ObjectiveSpec,
    OptimisationSpec,
    Overrides,
    ParametersSpec,
    StartSpec,
)
from icm_ray.config.merging import EvidenceRecipe, MergeRecipe
from icm_ray.config.parts import (
    AdapterRef,
    Adapters,
    DataSpec,
    Name,
    Output,
    Part,
    Positive,
    Recipe,
    Resources,
    Spec,
    changed,
    folder_names,
)
from icm_ray.config.pipeline import MethodRow, PipelineRecipe
from icm_ray.config.search import Halving, Searched, SearchObjective, SearchRecipe, SearchRow

__all__ = [
    "INPUT_BATCH",
    "AdapterRef",
    "Adapters",
    "BenchmarkRecipe",
    "DataSpec",
    "EngineSpec",
    "EvaluateRecipe",
    "EvidenceRecipe",
    "ExpertSet",
    "FinetuneRecipe",
    "FusionBenchmark",
    "FusionChanges",
    "FusionSpec",
    "Halving",
    "InContext",
    "InnerSpec",
    "LearnRecipe",
    "LearnSpec",
    "LoRARecipe",
    "MergeRecipe",
    "MethodRow",
    "Name",
    "ObjectiveSpec",
    "OptimisationSpec",
    "Output",
    "Overrides",
    "ParametersSpec",
    "Part",
    "PipelineRecipe",
    "Positive",
    "PrepareRecipe",
    "Recipe",
    "RepresentationSpec",
    "Resources",
    "SearchObjective",
    "SearchRecipe",
    "SearchRow",
    "Searched",
    "Shape",
    "Sizes",
    "Spec",
    "StartSpec",
    "StepsBenchmark",
    "TrainFusionRecipe",
    "Training",
    "VAESpec",
    "changed",
    "folder_names",
]
