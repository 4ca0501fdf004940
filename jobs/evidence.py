"""Gather task vectors and null-space ratios of K adapters, or what regmean needs.

python -m jobs.evidence -c configs/evidence/text.yaml [key=value ...]
"""

from icm_ray.command import Job
from icm_ray.config import EvidenceRecipe

work = Job(EvidenceRecipe, "icm_ray.workflows.evidence")

if __name__ == "__main__":
    work.main(__doc__)
