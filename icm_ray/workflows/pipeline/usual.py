"""What is tried where a recipe names no methods: rows with their usual grids, and what is not.

The grids are those of the results tables in docs/results, in which every one of them was tried;
that of regmean goes on to larger scales (docs/experiments.md).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from icm_ray.config import MethodRow


def _row(method: str, scales: Sequence[float] = (), **params: Any) -> MethodRow:
    grid: dict[str, list[float | str]] = {"scale": list(scales)} if scales else {}
    return MethodRow(method=method, params=params, grid=grid)


SUM = (0.2, 0.3, 0.4, 0.5, 0.7)
"""Scales of what sums the tasks."""
ELECTED = (0.3, 0.5, 0.7, 1.0, 1.5)
"""Scales of what averages those who agree."""

USUAL: tuple[MethodRow, ...] = (
    _row("soup"),
    _row("svd"),
    _row("linear"),
    _row("svd_latent"),
    _row("task_arithmetic", (0.1, *SUM), scale=0.4),
    _row("model_stock", (1.0, 1.5, 2.0, 3.0, 5.0)),
    _row("robust_merge", (0.1, 0.25, 0.5, 1.0, 2.0)),
    _row("lora_lego", (0.5, 1.0, 1.5, 2.0, 3.0)),
    _row("tsv", (0.15, 0.25, 0.4, 0.6, 1.0)),
    _row("iso_c", (0.4, 0.6, 0.8, 1.0, 1.3)),
    _row("iso_cts", (0.4, 0.6, 0.8, 1.0, 1.3)),
    _row("knots_ties", ELECTED),
    _row("knots_dare_ties", ELECTED),
    _row("core_space", ELECTED, inner="ties"),
    _row("ties", ELECTED),
    _row("dare", (0.1, *SUM)),
    _row("dare_ties", ELECTED),
    _row("magnitude_prune", SUM),
    _row("breadcrumbs", SUM),
    _row("della", ELECTED),
    _row("fr_merging", SUM),
    _row("regmean", (0.7, 0.85, 1.0, 1.15, 1.3, 1.45)),
    _row("row_space_match"),
    _row("nsc"),
    _row("task_vector_match"),
    _row("distillation"),
    _row("atlas"),
    _row("adamerging"),
    _row("icm_fusion"),
)

NEVER: Mapping[str, str] = {
    "cat": "the sum itself, which task_arithmetic scales",
    "emr": "an adapter for each task besides the common one",
    "negate_add": "takes a capability away instead of joining several",
    "compress_then_merge": "for a rank that is named",
    "lora_soups": "atlas from the average, to compare with the paper",
    "joint": "a control: trained anew on labels, it merges nothing",
    "esm": "a baseline; sees what regmean sees, and its scale has no usual value",
    "svc": "a baseline; amplifies what tasks do not share, and its scale has no usual value",
    "wudi": "a baseline; below task_arithmetic on encoders, and undone by shared initialisations",
}
"""Methods that are tried only where a recipe names them, each with the reason."""
