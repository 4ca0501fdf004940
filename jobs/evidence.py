"""Gather task vectors and null-space ratios of K adapters, one Ray actor an adapter.

Run it with `python -m jobs.evidence -c configs/evidence/text.yaml [key=value ...]`.
"""

import sys
from pathlib import Path
from typing import Any

from icm_ray.command import quiet_libraries, run_job
from icm_ray.config import EvidenceRecipe


def work(recipe: EvidenceRecipe, target: Path) -> dict[str, Any]:
    """Run on the cluster that RAY_ADDRESS or the submitted job gives, else on a local one."""
    from icm_ray.workflows.evidence import gather_evidence

    return gather_evidence(recipe, target)


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(run_job(EvidenceRecipe, work, __doc__ or ""))
