"""Steps around any method: what is done to a module's adapters before it, and to its result after.

They are set among a merge's params, beside the method's own: `params: {restore_norm: true}`.
"""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from pydantic import Field

Factor = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


@dataclass(frozen=True)
class Steps:
    """What is done around a method; nothing unless asked for.

    A calibration comes before the method, its passes included. The rest multiplies the result as
    it will be written, after the cut, so it holds for streamed results too and costs one number.
    """

    restore_norm: Annotated[
        bool,
        Field(description="Scale each module's result to the mean norm of the adapters' changes."),
    ] = False
    calibrate: Annotated[
        Literal["a", "b", "measured"] | None,
        Field(description="Weaken the directions that adapters share in A, in B, or where more."),
    ] = None
    scale_first: Annotated[
        Factor, Field(description="Multiplies the first block; blocks between lie between.")
    ] = 1.0
    scale_last: Annotated[Factor, Field(description="Multiplies the last block.")] = 1.0

    @property
    def asked(self) -> dict[str, Any]:
        """What is not as it is by itself."""
        values = ((one.name, getattr(self, one.name), one.default) for one in fields(self))
        return {name: value for name, value, default in values if value != default}

    def factor(self, norm: float, norms: Iterable[float], depth: float | None) -> float:
        """Return what a module's result is multiplied by.

        Args:
            norm: Frobenius norm of the result.
            norms: Of the deltas that are part of it; zeros do not count.
            depth: 0 for the first block, 1 for the last; None outside of blocks, which keep 1.
        """
        factor, heard = 1.0, [one for one in norms if one > 0]
        if self.restore_norm and norm > 0 and heard:
            factor = sum(heard) / len(heard) / norm
        if depth is None:
            return factor
        return factor * (self.scale_first + (self.scale_last - self.scale_first) * depth)


STEPS: Mapping[str, inspect.Parameter] = inspect.signature(Steps, eval_str=True).parameters
"""What any method takes among its params, by name."""
