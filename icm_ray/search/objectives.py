"""What a trial is judged by, and which way is better."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from icm_ray.learning.objectives import OBJECTIVES


@dataclass(frozen=True)
class Aim:
    """One objective of a search.

    Attributes:
        direction: Which way is better.
        needs: What has to be there: scored validation data, unlabelled inputs, heads, or nothing.
        meaning: One line for tables.
    """

    direction: Literal["maximize", "minimize"]
    needs: Literal["validation", "inputs", "heads", "fusion", "nothing"]
    meaning: str


AIMS: Mapping[str, Aim] = {
    "validation_mean": Aim("maximize", "validation", "mean validation score over the expert's"),
    "validation_worst": Aim("maximize", "validation", "the same of the worst task"),
    **{
        name: Aim("minimize", "heads" if row.reads_heads else "inputs", row.meaning)
        for name, row in OBJECTIVES.items()
        if row.is_measured
    },
    "output_rank": Aim("minimize", "nothing", "largest rank of the merged adapter"),
    "output_bytes": Aim("minimize", "nothing", "size of the merged adapter"),
    "reconstruction_error": Aim("minimize", "fusion", "relative error of the decoded adapters"),
    "kl_total": Aim("minimize", "fusion", "nats that the Fusion-VAE's latents hold"),
}
LABEL_FREE = tuple(name for name, row in OBJECTIVES.items() if row.is_measured)
SCORED = ("validation_mean", "validation_worst")


def better(name: str, one: float, other: float) -> bool:
    """Say whether `one` is a strictly better value of an objective than `other`."""
    return one > other if AIMS[name].direction == "maximize" else one < other


def rungs(first: int, factor: int, last: int) -> list[int]:
    """Return how much is looked at before each decision, and all of it at the end."""
    found = []
    while first < last:
        found.append(first)
        first *= factor
    return [*found, last]


def directions(names: Sequence[str]) -> list[str]:
    """Return the direction of each objective, as Optuna takes them."""
    return [AIMS[name].direction for name in names]
