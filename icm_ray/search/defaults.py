"""The ready-made space of each method, read from its signature: `space: default`."""

import typing
from collections.abc import Mapping
from typing import Any

from icm_ray.learning.recipes import LEARNERS
from icm_ray.methods import find_method

SCALES: Mapping[str, str] = {
    # Sums over tasks want less than 1, averages about 1, and these more than that.
    "lora_lego": "loguniform(0.3, 4)",
    "model_stock": "loguniform(0.5, 6)",
    "robust_merge": "loguniform(0.05, 2)",
    "negate_add": "uniform(-1, 2)",
}
USUAL_SCALE = "loguniform(0.1, 2)"
RANGES: Mapping[tuple[str, str], str] = {
    ("fr_merging", "ratio"): "uniform(0.1, 0.95)",
    ("breadcrumbs", "gamma"): "uniform(0, 0.1)",
    ("della", "density"): "uniform(0.2, 1)",  # epsilon has to be less than twice the density
    ("della", "epsilon"): "uniform(0, 0.3)",
    ("dare", "density"): "uniform(0.1, 1)",  # the fewer are kept, the louder the noise
    ("dare_ties", "density"): "uniform(0.1, 1)",
}
FUSION: Mapping[str, str | list[Any]] = {
    "fusion.kl_weight": "loguniform(1e-7, 1e-2)",  # above, the posterior collapses
    "fusion.inner.steps": "int(1, 4)",
    "fusion.inner.lr": "loguniform(0.003, 0.1)",
    "fusion.vae.latent": [4, 8, 16],
}
LEAST = 0.02
"""Smallest share that is tried where a signature allows any above 0."""


def default_space(method: str) -> dict[str, str | list[Any]]:
    """Return what is searched for a method unless the recipe says otherwise.

    The scale; every number with a lower and an upper bound; a learner's rate; and where there is
    none of these, one weight a task or the method's own choices.
    """
    row = find_method(method)
    described = row.schema()["parameters"]
    space: dict[str, str | list[Any]] = {}
    for name, schema in described.items():
        low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
        high = schema.get("exclusiveMaximum", high)
        if (method, name) in RANGES:
            space[f"params.{name}"] = RANGES[method, name]
        elif name == "scale":
            space["params.scale"] = SCALES.get(method, USUAL_SCALE)
        elif schema.get("type") == "number" and low is not None and high is not None:
            space[f"params.{name}"] = f"uniform({max(low, LEAST)}, {high})"
    if row.needs == "fusion_model":
        space |= FUSION
    if method in LEARNERS:
        rate = LEARNERS[method].optimisation.lr
        space["learn.optimisation.lr"] = f"loguniform({rate / 10:.6g}, {rate * 10:.6g})"
    if space:
        return space
    if "weights" in described:
        return {"weights.*": "uniform(0, 1)"}
    choices = {n: s["enum"] for n, s in described.items() if "enum" in s}
    return {f"params.{name}": list(typing.cast("list[Any]", c)) for name, c in choices.items()}
