"""Learn merge coefficients from unlabelled inputs, one actor a task.

python -m jobs.learn -c configs/learn/nsc.yaml
"""

import sys
from pathlib import Path
from typing import Any

from icm_ray.command import quiet_libraries, run_job
from icm_ray.config import LearnRecipe


def work(recipe: LearnRecipe, target: Path) -> dict[str, Any]:
    """Learn; returns what was written and the losses before and after."""
    from icm_ray.workflows.learn import learn_and_write

    return learn_and_write(recipe, target)


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(run_job(LearnRecipe, work, __doc__ or ""))
