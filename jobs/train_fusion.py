"""Meta-train a Fusion-VAE (ICM-Fusion) with Ray Train and DeepSpeed.

python -m jobs.train_fusion -c configs/train_fusion/text.yaml
"""

import sys
from pathlib import Path
from typing import Any

from icm_ray.command import quiet_libraries, run_job
from icm_ray.config import TrainFusionRecipe


def work(recipe: TrainFusionRecipe, target: Path) -> dict[str, Any]:
    """Train; returns what was written, the last losses and what the model loses."""
    from icm_ray.workflows.train_fusion import train_fusion_and_write

    return train_fusion_and_write(recipe, target)


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(run_job(TrainFusionRecipe, work, __doc__ or ""))
