"""Gather task vectors and null-space ratios of K adapters, or what regmean needs.

python -m jobs.evidence -c configs/evidence/text.yaml [key=value ...]
"""

from icm_ray.jobs import JOBS

work = JOBS["evidence"]

if __name__ == "__main__":
    work.main(__doc__)
