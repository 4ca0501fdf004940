"""Score adapters on a suite's tasks, normalised by the tasks' own experts.

python -m jobs.evaluate -c configs/evaluate/text.yaml [key=value ...]
"""

from icm_ray.jobs import JOBS

work = JOBS["evaluate"]

if __name__ == "__main__":
    work.main(__doc__)
