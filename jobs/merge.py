"""Merge K adapters into one over module shards on Ray; the same bytes as icm-ray merge.

python -m jobs.merge -c configs/merge/soup.yaml [key=value ...]
"""

from icm_ray.jobs import JOBS

work = JOBS["merge"]

if __name__ == "__main__":
    work.main(__doc__)
