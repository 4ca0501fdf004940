"""Formats of adapters: which one a path holds, and each in PEFT's words."""

from icm_ray.adapters.formats.experts import per_expert
from icm_ray.adapters.formats.finding import view_of
from icm_ray.adapters.formats.peft import WEIGHTS_FILE
from icm_ray.adapters.formats.shards import attempt
from icm_ray.adapters.formats.view import Stored, StoredTensors, View, open_stored

__all__ = [
    "WEIGHTS_FILE",
    "Stored",
    "StoredTensors",
    "View",
    "attempt",
    "open_stored",
    "per_expert",
    "view_of",
]
