"""What objectives of module inputs look at: which tokens count, and each A's row space."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from icm_ray.base_model.states import Batch
from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.targets import Targets
from icm_ray.linalg.subspace import row_space


@dataclass(frozen=True)
class Tokens:
    """Which tokens of a target's input count.

    Attributes:
        padding: Whether padding counts, as in the NSC authors' code.
        skip_first: Whether the first token, which many models park a huge constant on, is left out.
    """

    padding: bool = False
    skip_first: bool = False

    def weights(self, batch: Batch, inputs: Tensor) -> Float[Tensor, " rows"]:
        """Return 1 for each row of the flattened inputs that counts, 0 for others."""
        mask = torch.ones_like(batch.mask) if self.padding else batch.mask.clone()
        if self.skip_first:
            mask[:, 0] = False
        if inputs.shape[:2] != mask.shape:  # one row an example: a pooled state
            return inputs.new_ones(inputs.shape[:-1]).float().flatten()
        return mask.to(inputs.device, torch.float32).flatten()


REAL_TOKENS = Tokens()


def row_spaces(inputs: TaskInputs, targets: Targets) -> dict[str, Tensor]:
    """Return an orthonormal basis of A's rows for each target of a task."""
    adapter = inputs.adapter
    linear = {
        path: f for path, f in adapter.modules.items() if f.rank and path not in adapter.layouts
    }
    return {path: row_space(linear[path].a) for path in targets.choose(linear)}
