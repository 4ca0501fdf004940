"""Merge K adapters into one over module shards on Ray; the same bytes as icm-ray merge.

python -m jobs.merge -c configs/merge/soup.yaml [key=value ...]
"""

from icm_ray.command import Job
from icm_ray.config import MergeRecipe

work = Job(MergeRecipe, "icm_ray.workflows.merge")

if __name__ == "__main__":
    work.main(__doc__)
