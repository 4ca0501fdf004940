"""The merge methods: one file each, one row each in METHODS.

To add a method: write `methods/<name>.py` with one function whose keyword-only parameters are its
schema, add a row here, `configs/merge/<name>.yaml` and a golden test. Help, validation, contract
tests and the search space read the row.
"""

from collections.abc import Mapping

from icm_ray.methods.cat import cat
from icm_ray.methods.linear import linear
from icm_ray.methods.negate_add import negate_add
from icm_ray.methods.soup import soup
from icm_ray.methods.svd import svd
from icm_ray.methods.table import Method, frozen
from icm_ray.methods.task_arithmetic import task_arithmetic

_STACK = "O(R (d_out + d_in))"

METHODS: Mapping[str, Method] = frozen(
    {
        "soup": Method(
            "soup",
            soup,
            formula="sum_k w_k delta_k, w_k = 1/K",
            paper="arXiv 2203.05482",
            use="The safe first try: nothing to choose and nothing to tune.",
            cost=_STACK,
        ),
        "task_arithmetic": Method(
            "task_arithmetic",
            task_arithmetic,
            formula="scale * sum_k w_k delta_k, w_k = 1",
            paper="arXiv 2212.04089",
            use="When a scale can be chosen on validation data.",
            cost=_STACK,
        ),
        "cat": Method(
            "cat",
            cat,
            formula="sum_k w_k delta_k as [w_1 B_1 .. w_K B_K][A_1; ..; A_K], w_k = 1/K",
            paper="peft add_weighted_adapter(cat)",
            use="Exactly the weighted sum you name; rank is the sum of ranks.",
            cost=_STACK,
        ),
        "svd": Method(
            "svd",
            svd,
            formula="best rank-q approximation of sum_k w_k delta_k, w_k = 1/K",
            paper="peft add_weighted_adapter(svd)",
            use="When the result must be as small as one input adapter.",
            cost="O(R^2 (d_out + d_in) + R^3)",
            default_rank="largest input",
        ),
        "linear": Method(
            "linear",
            linear,
            formula="scale * (sum_k beta_k B_k)(sum_k alpha_k A_k)",
            paper="peft add_weighted_adapter(linear); arXiv 2603.26317",
            use="Only as a baseline: cross terms B_i A_j spoil it beyond two tasks.",
            cost=_STACK,
            exempt={
                "scaling": "the sums of A and of B depend on how a delta is split into both",
            },
        ),
        "negate_add": Method(
            "negate_add",
            negate_add,
            formula="delta_target + scale * (delta_a - delta_b)",
            paper="arXiv 2509.01363",
            use="To move a capability from one adapter to another, or to take it away.",
            cost=_STACK,
        ),
    }
)

__all__ = ["METHODS", "Method"]
