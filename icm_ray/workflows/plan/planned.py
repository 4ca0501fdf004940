"""What a plan says of a job, and how many workers it reckons with."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from icm_ray.adapters import AdapterFile
from icm_ray.config import EvidenceRecipe, LearnRecipe, Resources, SearchRecipe
from icm_ray.distributed.evidence import input_widths
from icm_ray.evidence.gram_files import room_lines, stored_bytes
from icm_ray.learning.tasks import LearnerData
from icm_ray.merging.estimate import warnings_of

LOOKS = 4
"""Passes over a learner's inputs beside its steps: base, expert, and the merge first and last."""


@dataclass(frozen=True)
class JobPlan:
    """What a job will do.

    Attributes:
        seconds: Of one worker, by stage.
        items: How many workers can share the work.
        starts: Seconds of what starts beside Ray and the workers that hold the base.
        gathered: Bytes of Gram statistics, all tasks together, at most.
        written: Bytes of what is written beside them, where that is much.
        left_out: What is not tried, with the reason.
        warnings: What is odd about the adapters.
    """

    seconds: Mapping[str, float]
    items: int
    starts: float = 0.0
    gathered: int = 0
    written: int = 0
    left_out: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


def workers_here(resources: Resources, items: int) -> int:
    """Return how many workers this machine would start."""
    fit = items
    if resources.cpus_per_worker:
        fit = int((os.cpu_count() or 1) / resources.cpus_per_worker)
    return max(1, min(items, resources.workers or items, fit))


def count(data: LearnerData) -> int:
    """Return how many inputs all tasks have together."""
    return sum(len(inputs) for inputs, _ in data.inputs.values())


def grams_of(
    recipe: EvidenceRecipe | LearnRecipe | SearchRecipe, files: Sequence[AdapterFile]
) -> tuple[int, list[str]]:
    """Return the bytes of all tasks' Gram statistics, and the job's warnings."""
    widths = list(input_widths(files).values())
    directions = recipe.resources.gram_directions
    room = room_lines(Path(recipe.output), widths, len(files), directions)
    return len(files) * stored_bytes(widths, directions), [*warnings_of(files), *room]
