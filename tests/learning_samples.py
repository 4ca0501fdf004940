"""What a learner's parameters stand for, worked out apart from the package's own way."""

from collections.abc import Sequence

import torch

from icm_ray import METHODS
from icm_ray.evidence.learned import LearnedMerge
from icm_ray.evidence.rebuild import added, combined, rebuild
from icm_ray.evidence.tensors import as_evidence
from icm_ray.learning.parameters import Parameters
from icm_ray.types import Adapter, LoRAFactors


def merged_factors(parameters: Parameters) -> dict[str, LoRAFactors]:
    """Return the exact merge of every module at the parameters' present values."""
    factors = {}
    with torch.no_grad():
        cores = parameters.cores()
        for module, frame in parameters.frames.items():
            one = combined(frame.left, cores[module].detach(), frame.right)
            factors[module] = one if frame.residual is None else added(one, frame.residual)
    return factors


def rebuilt(learned: LearnedMerge, adapters: Sequence[Adapter]) -> dict[str, LoRAFactors]:
    """Return what a method makes of a learned merge and the adapters, before any cut."""
    by_name = {adapter.name: adapter.modules for adapter in adapters}
    evidence = as_evidence(dict(learned.tensors))
    assert evidence is not None
    factors = {}
    for path in sorted({path for adapter in adapters for path in adapter.modules}):
        present = {t: by_name[t][path] for t in learned.tasks if path in by_name[t]}
        tensors = evidence.of(path, METHODS["nsc"].takes, learned.tasks)
        factors[path] = rebuild(present, learned.tasks, tensors)
    return factors
