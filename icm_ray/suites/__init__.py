"""Task suites: real labelled text and images, the base models for them, and a user's own data.

`SUITES` is the whole table; importing it loads neither torch nor transformers nor ray.
"""

from collections.abc import Mapping

from icm_ray.errors import RecipeError, did_you_mean
from icm_ray.suites.bases import BASES, PackagedBase, default_cache, prepare_base
from icm_ray.suites.folder import load_folder
from icm_ray.suites.generation import GENERATION
from icm_ray.suites.lm import LM
from icm_ray.suites.tasks import SPLITS, Examples, Suite, Task
from icm_ray.suites.text import TEXT
from icm_ray.suites.vision import VISION

SUITES: Mapping[str, Suite] = {
    "text": TEXT,
    "lm": LM,
    "generation": GENERATION,
    "vision": VISION,
}
"""Every suite that comes with the package, by name."""


def find_suite(name: str, key: str = "suite") -> Suite:
    """Return the suite called `name`; RecipeError at the recipe's `key` otherwise."""
    if name not in SUITES:
        raise RecipeError(
            f"{key}: {name!r} but one of {', '.join(SUITES)} is expected."
            f"{did_you_mean(name, SUITES)}"
        )
    return SUITES[name]


__all__ = [
    "BASES",
    "SPLITS",
    "SUITES",
    "Examples",
    "PackagedBase",
    "Suite",
    "Task",
    "default_cache",
    "find_suite",
    "load_folder",
    "prepare_base",
]
