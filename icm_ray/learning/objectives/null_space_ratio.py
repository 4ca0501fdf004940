"""NSC's loss: how much of a merge's inputs each adapter's A maps to nothing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from icm_ray.base_model.states import Batch
from icm_ray.devices import stacked
from icm_ray.learning.inputs import Seen, TaskInputs
from icm_ray.learning.objectives.module_inputs import REAL_TOKENS, Tokens, row_spaces
from icm_ray.learning.objectives.protocol import Measured, Memory, Scaling, TaskObjective
from icm_ray.learning.targets import Targets
from icm_ray.linalg.subspace import null_space_ratio

QUARTER = Targets("output", share=0.25)


@dataclass(frozen=True)
class NullSpaceRatio:
    """Mean null-space ratio of the merge's inputs under the task's own A.

    Paper: NSC, arXiv 2603.26317, Eq. 1 to 6. The ratio is a mean over tokens and target modules.
    Differs: padding is left out unless asked for, and A is whitened by an orthonormal basis in
    float64, so that the adapter's scaling cannot enter.
    """

    targets: Targets = QUARTER
    tokens: Tokens = REAL_TOKENS
    scaling: Scaling = "none"

    def of(self, inputs: TaskInputs) -> "_Ratio":
        """Return the task's objective over its own adapted modules."""
        return _Ratio(row_spaces(inputs, self.targets), self.tokens)


class _Ratio(TaskObjective):
    hidden = False

    def __init__(self, bases: dict[str, Tensor], tokens: Tokens) -> None:
        self.bases, self.tokens, self.modules = bases, tokens, tuple(bases)

    def measure(self, batch: Batch, seen: Seen, memory: Memory) -> Measured:
        """Return sums by component, and how many things were summed."""
        sums, count = [], 0.0
        for path, basis in self.bases.items():
            z = seen.inputs[path]
            weights = self.tokens.weights(batch, z)
            with torch.autocast(z.device.type, enabled=False):
                ratios = null_space_ratio(z.reshape(-1, z.shape[-1]), basis.to(z.device))
            sums.append((ratios * weights).sum())
            count = float(weights.sum())
        return stacked(sums), count
