"""Hundreds of tasks: a process's peak memory hardly grows with their number."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from icm_ray.adapters import save_adapter
from icm_ray.benchmarks.memory import random_adapter

LAYERS = {f"layers.{i}.proj": (256, 256) for i in range(3)}
MERGE = """
import json, resource, sys
from pathlib import Path
from icm_ray.adapters import open_all
from icm_ray.merging.merge import merge
method, *folders = sys.argv[1:]
files = open_all([(Path(folder).name, folder) for folder in folders])
merge(files[:2], method, output_rank=4)  # what imports and compiled loops take is no growth
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge(files, method, output_rank=4)
print(json.dumps([before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss]))
"""


def peak(method: str, folders: list[Path]) -> tuple[int, int]:
    """Return a fresh process's peak in kB, after a merge of two and after that of all."""
    command = [sys.executable, "-c", MERGE, method, *map(str, folders)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return tuple(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_ties_over_five_hundred_adapters_is_as_flat_as_a_sum(tmp_path) -> None:
    folders = [tmp_path / f"t{k:03d}" for k in range(500)]
    for folder in folders:
        save_adapter(random_adapter(LAYERS, folder.name, 4, 0), folder)
    peaks = {
        method: [peak(method, folders[:count])[1] for count in (100, 500)]
        for method in ("soup", "ties")
    }
    assert peaks["soup"][1] < 1.15 * peaks["soup"][0]
    assert peaks["ties"][1] < 1.15 * peaks["ties"][0]
    assert peaks["ties"][1] < 1.4 * peaks["soup"][1]
