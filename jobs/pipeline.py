"""From a base and its tasks to one proven adapter: finetune, merge, evaluate, report.

python -m jobs.pipeline -c configs/pipeline/quickstart.yaml [key=value ...]
"""

from icm_ray.command import Job
from icm_ray.config import PipelineRecipe

work = Job(PipelineRecipe, "icm_ray.workflows.pipeline.run")

if __name__ == "__main__":
    work.main(__doc__)
