"""PEFT adapter folders in and out: strict reading, exact writing, and proof of what was written."""

from icm_ray.adapters.alignment import check_together, name_problems
from icm_ray.adapters.base_fit import check_base, class_of, tied_warnings
from icm_ray.adapters.fingerprint import fingerprint_of
from icm_ray.adapters.formats.pickles import unpickled
from icm_ray.adapters.forward import verify_forward
from icm_ray.adapters.geometry import delta_cosines, geometry_of, readings
from icm_ray.adapters.opening import fit_base, open_all, with_common_names
from icm_ray.adapters.peft_format import AdapterFile, load_adapter, open_adapter
from icm_ray.adapters.peft_reading import verify_with_peft
from icm_ray.adapters.random_directions import random_like
from icm_ray.adapters.saving import save_adapter
from icm_ray.adapters.verify import verify_written

__all__ = [
    "AdapterFile",
    "check_base",
    "check_together",
    "class_of",
    "delta_cosines",
    "fingerprint_of",
    "fit_base",
    "geometry_of",
    "load_adapter",
    "name_problems",
    "open_adapter",
    "open_all",
    "random_like",
    "readings",
    "save_adapter",
    "tied_warnings",
    "unpickled",
    "verify_forward",
    "verify_with_peft",
    "verify_written",
    "with_common_names",
]
