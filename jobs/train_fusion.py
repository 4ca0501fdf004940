"""Meta-train a Fusion-VAE (ICM-Fusion) with Ray Train and DeepSpeed.

python -m jobs.train_fusion -c configs/train_fusion/text.yaml [key=value ...]
"""

from icm_ray.jobs import JOBS

work = JOBS["train_fusion"]

if __name__ == "__main__":
    work.main(__doc__)
