"""Learn merge coefficients from unlabelled inputs, one actor a task.

python -m jobs.learn -c configs/learn/nsc.yaml [key=value ...]
"""

from icm_ray.jobs import JOBS

work = JOBS["learn"]

if __name__ == "__main__":
    work.main(__doc__)
