"""Score adapters on a suite's tasks, normalised by the tasks' own experts.

Run it with `python -m jobs.evaluate -c configs/evaluate/text.yaml [key=value ...]`.
"""

import sys
from pathlib import Path
from typing import Any

from icm_ray.command import quiet_libraries, run_job
from icm_ray.config import EvaluateRecipe


def work(recipe: EvaluateRecipe, target: Path) -> dict[str, Any]:
    """Run on the cluster that RAY_ADDRESS or the submitted job gives, else on a local one."""
    from icm_ray.workflows.evaluate import evaluate_and_report

    return evaluate_and_report(recipe, target)


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(run_job(EvaluateRecipe, work, __doc__ or ""))
