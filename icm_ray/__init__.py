"""Merge many LoRA adapters of one base model into one, exactly, on a laptop or a Ray cluster.

import icm_ray
adapters = [icm_ray.load_adapter(path) for path in folders]
result = icm_ray.merge(adapters, "soup")
icm_ray.save_adapter(result.adapter, "merged")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import icm_ray.interruption  # noqa: F401 - first: it answers Ctrl-C while the rest is imported
from icm_ray.errors import ClusterError, ICMRayError, InputError, RecipeError, ResourceError
from icm_ray.methods import METHODS

if TYPE_CHECKING:
    from icm_ray.adapters import load_adapter, save_adapter
    from icm_ray.merging.merge import merge
    from icm_ray.types import Adapter, LoRAFactors, MergeReport, MergeResult

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Adapter",
    "ClusterError",
    "ICMRayError",
    "InputError",
    "LoRAFactors",
    "MergeReport",
    "MergeResult",
    "RecipeError",
    "ResourceError",
    "__version__",
    "load_adapter",
    "merge",
    "save_adapter",
]

_NEEDS_TORCH = {
    "icm_ray.adapters": ("load_adapter", "save_adapter"),
    "icm_ray.merging.merge": ("merge",),
    "icm_ray.types": ("Adapter", "LoRAFactors", "MergeReport", "MergeResult"),
}


def __getattr__(name: str) -> Any:
    """Import what needs torch when it is first asked for: help and a wrong recipe never do."""
    for module, names in _NEEDS_TORCH.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
