"""Measure merges: time, memory and error beside PEFT, and memory over many adapters.

python -m jobs.benchmark -c configs/benchmark/peft.yaml [key=value ...]
"""

from icm_ray.jobs import JOBS

work = JOBS["benchmark"]

if __name__ == "__main__":
    work.main(__doc__)
