"""The merge methods: one file each, one row each in METHODS.

To add a method: write `methods/<name>.py` with one function whose keyword-only parameters are its
schema, add a row here, `configs/merge/<name>.yaml` and a golden test. Help, validation, contract
tests and the search space read the row.
"""

from collections.abc import Mapping

from icm_ray.methods.cat import cat
from icm_ray.methods.fr_merging import fr_merging
from icm_ray.methods.iso_c import iso_c
from icm_ray.methods.iso_cts import iso_cts
from icm_ray.methods.linear import linear
from icm_ray.methods.lora_lego import lora_lego
from icm_ray.methods.model_stock import model_stock
from icm_ray.methods.negate_add import negate_add
from icm_ray.methods.regmean import regmean
from icm_ray.methods.robust_merge import robust_merge
from icm_ray.methods.soup import soup
from icm_ray.methods.svd import svd
from icm_ray.methods.svd_latent import svd_latent, svd_latent_passes
from icm_ray.methods.table import Method, frozen
from icm_ray.methods.task_arithmetic import task_arithmetic
from icm_ray.methods.tsv import tsv

_STACK = "O(R (d_out + d_in))"
_GRAM = "O(R^2 (d_out + d_in))"
_FLATTENED = {"identity": "every singular value of a single adapter becomes their mean, too"}

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
            cost=f"{_GRAM} + R^3",
            default_rank="largest input",
        ),
        "linear": Method(
            "linear",
            linear,
            formula="scale * (sum_k beta_k B_k)(sum_k alpha_k A_k)",
            paper="peft add_weighted_adapter(linear); arXiv 2603.26317",
            use="Only as a baseline: cross terms B_i A_j spoil it beyond two tasks.",
            cost=_STACK,
            family="factors",
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
        "svd_latent": Method(
            "svd_latent",
            svd_latent,
            formula="sum_k c_k x_k, c = P 1/K, P on the first principal components of all x_k",
            paper="arXiv 2508.04153 names it without a definition; our reading",
            use="As the linear counterpart of icm_fusion, or to average away what few tasks share.",
            cost=f"{_GRAM}, after one pass over all modules",
            family="factors",
            passes=svd_latent_passes,
        ),
        "regmean": Method(
            "regmean",
            regmean,
            formula="scale * (sum_k B_k A_k G_k)(sum_k G_k)^-1, G_k = X_k^T X_k / n_k",
            paper="arXiv 2212.09849",
            use="With a few hundred unlabelled inputs of every task; nothing is trained.",
            cost="O(d_in^3 + R d_in^2)",
            needs="GramStatistics",
            takes={"gram.<task>": "(d_in, d_in): X^T X / n over the module's inputs"},
        ),
        "lora_lego": Method(
            "lora_lego",
            lora_lego,
            formula="sum_c f_c^2 sqrt(r/k) b_c a_c, [a_c; b_c] the mean of cluster c of all units",
            paper="arXiv 2409.16167; arXiv 2603.26317 (preset nsc)",
            use="When adapters share an initialisation and the result must have a chosen rank.",
            cost=f"{_GRAM} + O(k R^2) a round of k-means",
            family="factors",
            takes={"init_idx": "(k,) whole numbers: units to start from, counted task by task"},
            exempt={
                "homogeneity": "lengths of [a; b] mix both factors, and scaling changes only b",
                "scaling": "the mean of [a; b] depends on how a delta is split into both",
            },
        ),
        "model_stock": Method(
            "model_stock",
            model_stock,
            formula="scale * t * (1/K) sum_k delta_k, t = n c / (1 + (n - 1) c), c mean cosine",
            paper="arXiv 2403.19522",
            use="For adapters of one task trained several times; unlike tasks end near the base.",
            cost=_GRAM,
        ),
        "fr_merging": Method(
            "fr_merging",
            fr_merging,
            formula="scale * sum_k c_k highpass(delta_k), c_k = max_j m_j / m_k, m mean magnitude",
            paper="arXiv 2411.16815",
            use="To compare with FREE-Merging's backbone; on square modules close to the sum.",
            cost="O(K n log n) for n = d_out d_in",
            family="subspaces",
            is_dense=True,
            default_rank="largest input",
            exempt={"identity": "the filter takes low frequencies from a single adapter, too"},
        ),
        "robust_merge": Method(
            "robust_merge",
            robust_merge,
            formula="scale * (sum_k w_k S_k B_k / sum_k S_k)(sum_k w_k A_k), A and B pruned, w = 2",
            paper="arXiv 2502.17159",
            use="As a baseline with the rank of one adapter; holds cross terms B_i A_j.",
            cost=_STACK,
            family="factors",
            exempt={
                "identity": "most entries of a single adapter are pruned, too",
                "scaling": "entries of A and of B are pruned and summed apart from each other",
            },
        ),
        "tsv": Method(
            "tsv",
            tsv,
            formula="scale * U diag(w s) V, U and V orthonormal, nearest to all singular vectors",
            paper="arXiv 2412.00081",
            use="For several unlike tasks without data; tune the scale, from about 1.5 / K.",
            cost=_GRAM,
            family="subspaces",
        ),
        "iso_c": Method(
            "iso_c",
            iso_c,
            formula="scale * mean(s) U V, sum_k delta_k = U diag(s) V",
            paper="arXiv 2502.04959",
            use="When weak tasks drown in the sum: all directions get one strength.",
            cost=_GRAM,
            family="subspaces",
            exempt=_FLATTENED,
        ),
        "iso_cts": Method(
            "iso_cts",
            iso_cts,
            formula="scale * mean(s) U V over common directions and each task's own",
            paper="arXiv 2502.04959",
            use="Like iso_c with many tasks, whose own directions the sum would lose.",
            cost=_GRAM,
            family="subspaces",
            exempt=_FLATTENED,
        ),
    }
)

__all__ = ["METHODS", "Method"]
