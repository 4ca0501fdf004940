"""The merge methods: one file each, one row each in METHODS.

To add a method: write `methods/<name>.py` with one function of that name whose keyword-only
parameters are its schema, add a row here and in the README, `configs/merge/<name>.yaml` and a
golden test. Help, validation, contract tests and the search space read the row. Methods need torch,
which takes seconds to import: the table imports none, a row its own when it is first run.
"""

from collections.abc import Mapping
from typing import Any

from icm_ray.errors import RecipeError, did_you_mean
from icm_ray.methods.table import Method, frozen

_STACK = "O(R (d_out + d_in))"
_GRAM = "O(R^2 (d_out + d_in))"
_ENTRIES = "O(R d_out d_in), {} over K d_out d_in entries"
_MASKS = {
    "mask.<task>": "(d_out, d_in), nonzero keeps an entry of the delta",
    "mask_a.<task>": "(rank, d_in), preset peft: nonzero keeps an entry of A",
    "mask_b.<task>": "(d_out, rank), preset peft: nonzero keeps an entry of B",
}
_INPUTS = {
    "gram.<task>": "(d_in, d_in): X^T X / n over the module's inputs, or its upper triangle",
    "gram_root.<task>": "(R, d_in): U of U^T U + diag(v) in place of it",
    "gram_diagonal.<task>": "(d_in,): v of the same",
}
_LEARNED: dict[str, Any] = {
    "cost": "steps x tasks forward and backward passes of the base in jobs.learn, then a stack",
    "needs": "learned_merge",
    "takes": {
        "coefficients": "(tasks, blocks): multiplies the terms' ranks",
        "core": "(p, q): stands between the polar factors of the stacked terms",
        "a": "(rank, d_in): A of what was learned in place of the terms",
        "b": "(d_out, rank): B of what was learned in place of the terms",
        "a.<task>": "(rank, d_in): replaces the adapter's A as the task's term",
        "b.<task>": "(d_out, rank): replaces the adapter's B as the task's term",
        "residual_a": "(rank, d_in): A of what is added as it is",
        "residual_b": "(d_out, rank): B of what is added as it is",
    },
    "family": "learned",
    "module": "learned",
}
_FLATTENED = {"identity": "every singular value of a single adapter becomes their mean, too"}

METHODS: Mapping[str, Method] = frozen(
    {
        "soup": Method(
            "soup",
            formula="sum_k w_k delta_k, w_k = 1/K",
            paper="arXiv 2203.05482",
            use="The safe first try: nothing to choose and nothing to tune.",
            cost=_STACK,
        ),
        "task_arithmetic": Method(
            "task_arithmetic",
            formula="scale * sum_k w_k delta_k, w_k = 1",
            paper="arXiv 2212.04089",
            use="When a scale can be chosen on validation data.",
            cost=_STACK,
        ),
        "cat": Method(
            "cat",
            formula="sum_k w_k delta_k as [w_1 B_1 .. w_K B_K][A_1; ..; A_K], w_k = 1/K",
            paper="peft add_weighted_adapter(cat)",
            use="Exactly the weighted sum you name; rank is the sum of ranks.",
            cost=_STACK,
        ),
        "svd": Method(
            "svd",
            formula="best rank-q approximation of sum_k w_k delta_k, w_k = 1/K",
            paper="peft add_weighted_adapter(svd)",
            use="When the result must be as small as one input adapter.",
            cost=f"{_GRAM} + R^3",
            default_rank="largest input",
        ),
        "linear": Method(
            "linear",
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
            formula="delta_target + scale * (delta_a - delta_b)",
            paper="arXiv 2509.01363",
            use="To move a capability from one adapter to another, or to take it away.",
            cost=_STACK,
        ),
        "svd_latent": Method(
            "svd_latent",
            formula="sum_k c_k x_k, c = P 1/K, P on the first principal components of all x_k",
            paper="arXiv 2508.04153 names it without a definition; our reading",
            use="As the linear counterpart of icm_fusion, or to average away what few tasks share.",
            cost=f"{_GRAM}, after one pass over all modules",
            family="factors",
        ),
        "regmean": Method(
            "regmean",
            formula="scale * (sum_k B_k A_k G_k)(sum_k G_k)^-1, G_k = X_k^T X_k / n_k",
            paper="arXiv 2212.09849",
            use="With a few hundred unlabelled inputs of every task; nothing is trained.",
            cost="O(d_in^3 + R d_in^2)",
            needs="gram_statistics",
            takes=_INPUTS,
        ),
        "wudi": Method(
            "wudi",
            formula="scale * (sum_k delta_k G_k)(sum_k G_k)^-1, G_k that of the rows of delta_k",
            paper="arXiv 2503.08099",
            use="As a baseline: regmean without inputs. Tune the scale; see inspect's row overlap.",
            cost="O(R^2 (d_out + d_in) + K R^3)",
        ),
        "svc": Method(
            "svc",
            formula="scale * U diag(gamma s) V^T of sum_k w_k delta_k, gamma_r = K / sum of shares",
            paper="arXiv 2602.05536",
            use="As a baseline: a sum whose shared directions are shrunk. Tune the scale.",
            cost="O(R^2 (d_out + d_in) + K R^3)",
            family="subspaces",
        ),
        "lora_lego": Method(
            "lora_lego",
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
            formula="scale * t * (1/K) sum_k delta_k, t = n c / (1 + (n - 1) c), c mean cosine",
            paper="arXiv 2403.19522",
            use="For adapters of one task trained several times; unlike tasks end near the base.",
            cost=_GRAM,
        ),
        "fr_merging": Method(
            "fr_merging",
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
        "knots_ties": Method(
            "knots_ties",
            formula="scale * U TIES(P_1 .. P_K), [delta_1 .. delta_K] = U [P_1 .. P_K]",
            paper="arXiv 2410.19735",
            use="Like ties where adapters are poorly aligned; the result stays an exact LoRA.",
            cost="O(R^2 (d_out + d_in) + K R r d_in), four sweeps over K R d_in coordinates",
            family="subspaces",
            takes={"U": "(d_out, q), preset nsc: signs of the singular vectors to take"},
        ),
        "knots_dare_ties": Method(
            "knots_dare_ties",
            formula="scale * U TIES(M_1 * P_1 / density ..), [delta_1 .. delta_K] = U [P_1 .. P_K]",
            paper="arXiv 2410.19735, 2311.03099",
            use="Like knots_ties, with entries dropped by chance in place of the trim.",
            cost="O(R^2 (d_out + d_in) + K R r d_in), two to four sweeps over K R d_in coordinates",
            family="subspaces",
            takes={
                "mask.<task>": "(q, d_in), nonzero keeps; rows by descending singular value",
                "U": "(d_out, q), signs of the singular vectors to take",
            },
        ),
        "core_space": Method(
            "core_space",
            formula="scale * U inner(M_1 .. M_K) V, delta_k = U M_k V",
            paper="arXiv 2509.17786",
            use="To merge any way in the small space all adapters span; fast for any model size.",
            cost="O(R^2 (d_out + d_in) + K R^3)",
            family="subspaces",
            takes={"mask.<task>": "(p, q), dare and dare_ties: nonzero keeps an entry of the core"},
        ),
        "compress_then_merge": Method(
            "compress_then_merge",
            formula="scale * U inner(U^T delta_1 V .. U^T delta_K V) V^T, U and V of a chosen rank",
            paper="arXiv 2606.03723",
            use="When the result must have a small rank: nothing is cut after the merge.",
            cost="O(R^2 (d_out + d_in) + rounds R^3)",
            family="subspaces",
            takes={"mask.<task>": "(rank, rank), dare_ties: nonzero keeps an entry of the core"},
        ),
        "tsv": Method(
            "tsv",
            formula="scale * U diag(w s) V, U and V orthonormal, nearest to all singular vectors",
            paper="arXiv 2412.00081",
            use="For several unlike tasks without data; tune the scale, from about 1.5 / K.",
            cost=_GRAM,
            family="subspaces",
        ),
        "esm": Method(
            "esm",
            formula="scale * l^2 mean(s_U) mean(s_V) U V, U and V nearest to all output shifts",
            paper="arXiv 2602.20208",
            use="As a baseline: tsv in the metric of unlabelled inputs. Tune the scale.",
            cost="O(R d_in^2 + R^2 (d_out + d_in)), twice",
            needs="gram_statistics",
            family="subspaces",
            takes=_INPUTS,
            exempt=_FLATTENED,
        ),
        "iso_c": Method(
            "iso_c",
            formula="scale * mean(s) U V, sum_k delta_k = U diag(s) V",
            paper="arXiv 2502.04959",
            use="When weak tasks drown in the sum: all directions get one strength.",
            cost=_GRAM,
            family="subspaces",
            exempt=_FLATTENED,
        ),
        "iso_cts": Method(
            "iso_cts",
            formula="scale * mean(s) U V over common directions and each task's own",
            paper="arXiv 2502.04959",
            use="Like iso_c with many tasks, whose own directions the sum would lose.",
            cost=_GRAM,
            family="subspaces",
            exempt=_FLATTENED,
        ),
        "ties": Method(
            "ties",
            formula="scale / n * sum of w_k trim(delta_k) over the n tasks with the elected sign",
            paper="arXiv 2306.01708",
            use="When tasks pull single weights in opposite directions; tune the scale.",
            cost=_ENTRIES.format("three to four sweeps"),
            family="signs and sparsity",
            is_dense=True,
            default_rank="largest input",
        ),
        "dare": Method(
            "dare",
            formula="scale * sum_k w_k (M_k * delta_k) / density, M_k random keep-masks, w_k = 1",
            paper="arXiv 2311.03099",
            use="As a baseline; for LoRA an unbiased but noisy task_arithmetic.",
            cost=_ENTRIES.format("one sweep"),
            family="signs and sparsity",
            is_dense=True,
            takes=_MASKS,
            default_rank="largest input",
        ),
        "dare_ties": Method(
            "dare_ties",
            formula="ties of (M_k * delta_k) / density, M_k random keep-masks, nothing trimmed",
            paper="arXiv 2311.03099, 2306.01708",
            use="Like ties, with chance in place of magnitude; high densities suit LoRA.",
            cost=_ENTRIES.format("two to four sweeps"),
            family="signs and sparsity",
            is_dense=True,
            takes=_MASKS,
            default_rank="largest input",
        ),
        "magnitude_prune": Method(
            "magnitude_prune",
            formula="scale * sum_k w_k top(delta_k), the largest entries of each module, w_k = 1",
            paper="peft add_weighted_adapter(magnitude_prune)",
            use="To see how much of a merge its largest entries carry.",
            cost=_ENTRIES.format("three sweeps"),
            family="signs and sparsity",
            is_dense=True,
            default_rank="largest input",
        ),
        "breadcrumbs": Method(
            "breadcrumbs",
            formula="scale * sum_k w_k middle(delta_k), neither smallest nor largest entries",
            paper="arXiv 2312.06795",
            use="Like magnitude_prune where a few outliers dominate a delta.",
            cost=_ENTRIES.format("six sweeps"),
            family="signs and sparsity",
            is_dense=True,
            default_rank="largest input",
        ),
        "della": Method(
            "della",
            formula="ties of M_k * delta_k / p, kept with probability p by rank in the row",
            paper="arXiv 2406.11617",
            use="Between ties and dare_ties: chance that favours large entries.",
            cost=_ENTRIES.format("one sweep with a sort of each row"),
            family="signs and sparsity",
            is_dense=True,
            default_rank="largest input",
        ),
        "emr": Method(
            "emr",
            formula="unified = gamma max_k |delta_k|; for each task rescaler_k mask_k unified",
            paper="arXiv 2405.17461",
            use="When a mask can be swapped for each task: adapters close to the experts, untuned.",
            cost="O(K R d_out d_in), K + 2 sweeps over K d_out d_in entries",
            family="signs and sparsity",
            is_dense=True,
            default_rank="largest input",
        ),
        "nsc": Method(
            "nsc",
            formula="sum_k c_k delta_k, c minimises the null-space ratio of each task's inputs",
            paper="arXiv 2603.26317",
            use="To compare with the paper; check the report for tasks without a signal.",
            **_LEARNED,
        ),
        "row_space_match": Method(
            "row_space_match",
            formula="U C V + RegMean, C so that each A sees in the merge what its expert saw",
            paper="ours, from the geometry of arXiv 2603.26317",
            use="Unlabelled inputs, any kind of task, cheap: the forward stops after the targets.",
            **_LEARNED,
        ),
        "task_vector_match": Method(
            "task_vector_match",
            formula="U C V + RegMean, C so that each input's task vector is the expert's",
            paper="ours, from Eq. 1 of arXiv 2508.04153",
            use="Unlabelled inputs, any kind of task; also seen by heads (heads: true).",
            **_LEARNED,
        ),
        "distillation": Method(
            "distillation",
            formula="U C V + RegMean, C so that heads say of each input what the expert says",
            paper="ours, from arXiv 1503.02531 and 1606.07947",
            use="Unlabelled inputs and the experts' heads, or a language model: the first choice.",
            **_LEARNED,
        ),
        "adamerging": Method(
            "adamerging",
            formula="sum_k c_k delta_k, c in [0, 1] minimises the entropy of the heads' answers",
            paper="arXiv 2310.02575",
            use="Classifications and language models; says nothing about regressions.",
            **_LEARNED,
        ),
        "atlas": Method(
            "atlas",
            formula="sum_k c_k delta_k, c fitted to a few labelled inputs, from zero",
            paper="arXiv 2407.02880",
            use="With a few labels of every task.",
            **_LEARNED,
        ),
        "lora_soups": Method(
            "lora_soups",
            formula="sum_k c_k delta_k, c fitted to a few labelled inputs, from the average",
            paper="arXiv 2410.13025, CAT",
            use="As atlas, where the average is the better start.",
            **_LEARNED,
        ),
        "joint": Method(
            "joint",
            formula="B A, a new LoRA that is trained on the labels of all tasks",
            paper="joint multi-task training, the upper bound of most papers' tables",
            use="A control, no merge: what one adapter reaches through the experts' heads.",
            **_LEARNED,
        ),
        "icm_fusion": Method(
            "icm_fusion",
            formula="sum_k w_k delta_k + D(z*; v*) - sum_k w_k D(z_k; v_k), D a trained decoder",
            paper="arXiv 2508.04153",
            use="Any subset of the tasks one Fusion-VAE knows, without learning again.",
            cost="the decoder once a task, then a stack",
            needs="fusion_model",
            takes={
                "left": "(d_out, p), what a Fusion-VAE decoded: left @ core @ right",
                "core": "(p, q), or a diagonal (q,)",
                "right": "(q, d_in)",
                "shares": "(tasks,), weights of the adapters that are added to it",
                "residual_a": "(rank, d_in), A of what is added as it is",
                "residual_b": "(d_out, rank), B of what is added as it is",
            },
            family="learned",
        ),
    }
)


def find_method(name: str) -> Method:
    """Return the METHODS row called `name`; RecipeError with the nearest name otherwise."""
    if name not in METHODS:
        raise RecipeError(
            f"method: {name!r} is not known but one of {', '.join(METHODS)} is expected."
            f"{did_you_mean(name, METHODS)}"
        )
    return METHODS[name]


__all__ = ["METHODS", "Method", "find_method"]
