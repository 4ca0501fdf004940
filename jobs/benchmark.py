"""Measure merges: time, memory and error beside PEFT, and memory over many adapters.

python -m jobs.benchmark -c configs/benchmark/peft.yaml
python -m jobs.benchmark -c configs/benchmark/methods.yaml
python -m jobs.benchmark -c configs/benchmark/many.yaml
"""

import sys
from pathlib import Path
from typing import Any

from icm_ray.command import quiet_libraries, run_job
from icm_ray.config import BenchmarkRecipe


def work(recipe: BenchmarkRecipe, target: Path) -> dict[str, Any]:
    """Print the tables and write them to `benchmark.md`."""
    from icm_ray.benchmarks.run import run_benchmark

    return run_benchmark(recipe, target)


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(run_job(BenchmarkRecipe, work, __doc__ or ""))
