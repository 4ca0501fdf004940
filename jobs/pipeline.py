"""From a base and its tasks to one proven adapter: finetune, merge, evaluate, report.

Run it with `python -m jobs.pipeline -c configs/pipeline/quickstart.yaml [key=value ...]`.
"""

import sys
from pathlib import Path
from typing import Any

from icm_ray.command import quiet_libraries, run_job
from icm_ray.config import PipelineRecipe


def work(recipe: PipelineRecipe, target: Path) -> dict[str, Any]:
    """Run on the cluster that RAY_ADDRESS or the submitted job gives, else on a local one."""
    from icm_ray.workflows.pipeline.run import pipeline_and_report

    return pipeline_and_report(recipe, target)


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(run_job(PipelineRecipe, work, __doc__ or ""))
