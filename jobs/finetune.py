"""Fine-tune K LoRA experts of one base in parallel and score them against a linear probe.

Run it with `python -m jobs.finetune -c configs/finetune/text.yaml [key=value ...]`.
"""

import sys
from pathlib import Path
from typing import Any

from icm_ray.command import quiet_libraries, run_job
from icm_ray.config import FinetuneRecipe


def work(recipe: FinetuneRecipe, target: Path) -> dict[str, Any]:
    """Run on the cluster that RAY_ADDRESS or the submitted job gives, else on a local one."""
    from icm_ray.workflows.finetune import finetune_and_report

    return finetune_and_report(recipe, target)


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(run_job(FinetuneRecipe, work, __doc__ or ""))
