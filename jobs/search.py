"""Search merge methods, their parameters and coefficients with Ray Tune and Optuna.

python -m jobs.search -c configs/search/ties.yaml [key=value ...]

Kill it whenever you like: the same command goes on. best.yaml in the output folder is always the
best merge so far, as a recipe of jobs.merge.
"""

import sys
from pathlib import Path
from typing import Any

from icm_ray.command import quiet_libraries, run_job
from icm_ray.config import SearchRecipe


def work(recipe: SearchRecipe, target: Path) -> dict[str, Any]:
    """Search; returns the best point, its scores and where its adapter is."""
    from icm_ray.workflows.search.run import search_and_write

    return search_and_write(recipe, target)


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(run_job(SearchRecipe, work, __doc__ or ""))
