"""The ready-made space of each method, read from its signature: `space: default`."""

import typing
from collections.abc import Mapping
from typing import Any

from icm_ray.learning.recipes import LEARNERS
from icm_ray.methods import find_method

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

    What a parameter calls usual; every other number with a lower and an upper bound; a learner's
    rate; and where there is none of these, one weight a task or the method's own choices.
    """
    row = find_method(method)
    described = row.schema()["parameters"]
    space: dict[str, str | list[Any]] = {}
    for name, schema in described.items():
        low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
        high = schema.get("exclusiveMaximum", high)
        if "usual" in schema:
            space[f"params.{name}"] = schema["usual"]
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
