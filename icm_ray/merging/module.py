"""One module of a merge, on its way from the worker that made it to the whole adapter."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from icm_ray.types import LoRAFactors, ModuleReport


@dataclass(frozen=True)
class MergedModule:
    """One module after the merge and the cut.

    Attributes:
        factors: The merged change.
        report: What happened to it.
        tasks: Each task's own change, for methods that make them.
        values: How much inputs see of each rank, if it was cut for them; see `cut.Seen`.
    """

    factors: LoRAFactors
    report: ModuleReport
    tasks: Mapping[str, LoRAFactors] = field(default_factory=dict)
    values: Float[Tensor, " rank"] | None = None
