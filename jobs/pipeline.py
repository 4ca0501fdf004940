"""From a base and its tasks to one proven adapter: finetune, merge, evaluate, report.

python -m jobs.pipeline -c configs/pipeline/quickstart.yaml [key=value ...]
"""

from icm_ray.jobs import JOBS

work = JOBS["pipeline"]

if __name__ == "__main__":
    work.main(__doc__)
