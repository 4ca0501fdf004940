"""Meta-train a Fusion-VAE (ICM-Fusion) with Ray Train and DeepSpeed.

python -m jobs.train_fusion -c configs/train_fusion/text.yaml [key=value ...]
"""

from icm_ray.command import Job
from icm_ray.config import TrainFusionRecipe

work = Job(TrainFusionRecipe, "icm_ray.workflows.train_fusion")

if __name__ == "__main__":
    work.main(__doc__)
