"""A merge's inputs, seen through each adapter's A, beside what the expert saw there."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from icm_ray.base_model.states import Batch
from icm_ray.devices import stacked
from icm_ray.learning.inputs import Seen, TaskInputs
from icm_ray.learning.objectives.module_inputs import REAL_TOKENS, Tokens, row_spaces
from icm_ray.learning.objectives.protocol import Measured, Memory, Scaling, TaskObjective
from icm_ray.learning.targets import Targets

LAST_BLOCK = Targets("all", share=1e-9)


@dataclass(frozen=True)
class RowSpaceMatch:
    """The merge's inputs, seen through the task's own A, should be what the expert saw there.

    Per target module: `sum |Q' (z_merge - z_expert)|^2 / sum |Q' z_expert|^2` with Q an orthonormal
    basis of A's rows. It needs no labels, no heads and no outputs, and unlike the null-space ratio
    it is zero for the expert alone.

    Attributes:
        targets: Which modules; the default is everything adapted in the last block.
        tokens: Which tokens.
        against: What the error is divided by: the expert's own values, or the gap between the
            base's and the expert's, which makes the base's loss 1.
    """

    targets: Targets = LAST_BLOCK
    tokens: Tokens = REAL_TOKENS
    against: Literal["expert", "gap"] = "expert"
    scaling: Scaling = "energy"

    def of(self, inputs: TaskInputs) -> "_RowSpace":
        """Return the task's objective over its own adapted modules."""
        return _RowSpace(row_spaces(inputs, self.targets), self.tokens, self.against)


class _RowSpace(TaskObjective):
    hidden = False

    def __init__(self, bases: dict[str, Tensor], tokens: Tokens, against: str) -> None:
        self.bases, self.tokens, self.against = bases, tokens, against
        self.modules = tuple(bases)

    def _projected(self, seen: Seen, path: str) -> Tensor:
        z = seen.inputs[path]
        return z.reshape(-1, z.shape[-1]).float() @ self.bases[path].to(z.device)

    def remember(self, batch: Batch, expert: Seen, base: Seen) -> Memory:
        """Return what of the expert the measure compares with."""
        memory = {path: self._projected(expert, path) for path in self.bases}
        energies = []
        for path, y in memory.items():
            gap = y - self._projected(base, path) if self.against == "gap" else y
            weights = self.tokens.weights(batch, expert.inputs[path])
            energies.append((gap.square().sum(-1) * weights).sum())
        return {**memory, "energy": stacked(energies)}

    def measure(self, batch: Batch, seen: Seen, memory: Memory) -> Measured:
        """Return sums by component, and how many things were summed."""
        sums, count = [], 0.0
        for path in self.bases:
            error = (self._projected(seen, path) - memory[path]).square().sum(-1)
            weights = self.tokens.weights(batch, seen.inputs[path])
            sums.append((error * weights).sum())
            count = float(weights.sum())
        return stacked(sums), count
