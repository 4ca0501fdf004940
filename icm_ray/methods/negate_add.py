"""Reasoning vectors: add the difference of two adapters to a third."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from icm_ray.methods.shared.parameters import Scale, usual
from icm_ray.methods.shared.weighted_sum import weighted_sum
from icm_ray.types import Delta, LoRAFactors, ModuleContext

Role = Annotated[str, Field(json_schema_extra={"role": "adapter"})]


def negate_add(
    factors: Sequence[LoRAFactors],
    *,
    context: ModuleContext,
    target: Annotated[Role, Field(description="Adapter that receives the vector.")] = "target",
    a: Annotated[Role, Field(description="Adapter that has the capability.")] = "a",
    b: Annotated[Role, Field(description="Its sibling without the capability.")] = "b",
    scale: Annotated[Scale, usual("uniform(-1, 2)")] = 1.0,
) -> LoRAFactors | Delta:
    """Move a capability: `delta_target + scale * (delta_a - delta_b)`.

    Paper: arXiv 2509.01363 (reasoning vectors, theta_A - theta_B added to a third model). A
    negative scale takes the capability away. The three roles name adapters of the merge; one
    adapter may play two roles, and applied to `target = b` with scale 1 the result is `a` exactly.
    """
    numbers = dict.fromkeys(context.tasks, 0.0)
    for name, number in ((target, 1.0), (a, scale), (b, -scale)):
        if name in numbers:
            numbers[name] += number
    return weighted_sum(factors, list(numbers.values()))
