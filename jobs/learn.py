"""Learn merge coefficients from unlabelled inputs, one actor a task.

python -m jobs.learn -c configs/learn/nsc.yaml [key=value ...]
"""

from icm_ray.command import Job
from icm_ray.config import LearnRecipe

work = Job(LearnRecipe, "icm_ray.workflows.learn")

if __name__ == "__main__":
    work.main(__doc__)
