"""Controls of a results table: random adapters, which rows with `random` merge."""

from typing import Any

from icm_ray.config import MethodRow
from icm_ray.distributed.cluster import run_tasks
from icm_ray.distributed.merge import random_to_folder
from icm_ray.files import is_done, sha256_of
from icm_ray.kinds import RANDOM, REALIGNED
from icm_ray.merging.requirements import needs_of
from icm_ray.workflows.pipeline.table import Table

VERSION = 1


def make_random(table: Table) -> None:
    """Write a random adapter like each one of every set, if a row merges these."""
    if not any(row.random for row in table.rows):
        return
    missing: dict[tuple[str, str], tuple[Any, ...]] = {}
    for one in table.sets:
        for file in one.files():
            folder = table.root / "random" / one.label / file.name
            key = sha256_of([VERSION, file.fingerprint, table.session.seed])
            one.random[file.name] = folder
            if not is_done(folder, key):
                missing[one.label, file.name] = (file, table.session.seed, folder, key)
    run_tasks(random_to_folder, missing, table.session.resources)


def control_problems(row: MethodRow) -> list[str]:
    """Return what a row says of random adapters that does not go, one line each."""
    lines = []
    if row.random and needs_of(row.method, row.metric):
        lines.append(
            f"methods.{row.name}.random: random adapters have no inputs, and {row.method} needs "
            "evidence of theirs. Choose a method without data."
        )
    if row.random and row.search:
        lines.append(f"methods.{row.name}.search: for merges; a control takes a grid.")
    if row.name.endswith(REALIGNED) or (not row.random and row.name.endswith(RANDOM)):
        lines.append(f"methods.{row.name}: its end marks a control. Choose another label.")
    return lines
