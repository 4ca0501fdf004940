"""Merge K adapters into one over module shards on Ray; the same bytes as icm-ray merge.

Run it with `python -m jobs.merge -c configs/merge/soup.yaml [key=value ...]`.
"""

import sys
from pathlib import Path
from typing import Any

from icm_ray.command import quiet_libraries, run_job
from icm_ray.config import MergeRecipe


def work(recipe: MergeRecipe, target: Path) -> dict[str, Any]:
    """Run on the cluster that RAY_ADDRESS or the submitted job gives, else on a local one."""
    from icm_ray.workflows.merge import merge_and_write

    return merge_and_write(recipe, target)


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(run_job(MergeRecipe, work, __doc__ or ""))
