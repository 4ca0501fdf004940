"""Measure merges: time, memory and error beside PEFT, and memory over many adapters.

python -m jobs.benchmark -c configs/benchmark/peft.yaml [key=value ...]
"""

from icm_ray.command import Job
from icm_ray.config import BenchmarkRecipe

work = Job(BenchmarkRecipe, "icm_ray.benchmarks.run")

if __name__ == "__main__":
    work.main(__doc__)
