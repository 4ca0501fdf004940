"""Null-space ratios of merges: what the pictures need.

ratios/<set>/<row>/  every test input's ratio, by task and module
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from icm_ray.adapters import open_adapter
from icm_ray.distributed.actors import AdapterSource
from icm_ray.distributed.evidence import EVIDENCE_BATCH
from icm_ray.distributed.session import Pool
from icm_ray.files import is_done, read_json, read_manifest, sha256_of, whole_folder, write_json
from icm_ray.report.data import BASE, EXPERT
from icm_ray.workflows.pipeline.table import DEFAULT, SetResults, Table

VERSION = 1
RATIOS, MODULES = "ratios.safetensors", "modules.json"


@dataclass(frozen=True)
class RowRatios:
    """One row's ratios.

    Attributes:
        modules: Modules by task.
        values: `(examples, modules)` by task, in the order of the test split.
    """

    modules: Mapping[str, Sequence[str]]
    values: Mapping[str, Tensor]

    def by_module(self) -> dict[str, dict[str, float]]:
        """Return the mean over examples, by task and module."""
        return {
            task: dict(zip(self.modules[task], values.double().mean(0).tolist(), strict=True))
            for task, values in self.values.items()
        }

    def quarters(self, task: str) -> list[np.ndarray]:
        """Return the examples of a task in four parts, from the lowest mean ratio up."""
        order = self.values[task].double().mean(1).numpy().argsort(kind="stable")
        return np.array_split(order, 4)


def ratios_of_rows(table: Table, one: SetResults, pool: Pool) -> dict[str, Path]:
    """Return folders of ratios by learned row, of the experts and of the base; one set's.

    Every input of a task is measured against the A of the task's own expert.
    """
    if not one.learned:
        return {}
    own = {file.name: AdapterSource(file) for file in one.proven()}
    features: dict[str, Mapping[str, AdapterSource | None]] = {
        BASE: dict.fromkeys(own),
        EXPERT: own,
    }
    for row in one.learned:
        source = AdapterSource(open_adapter(one.merged[row, DEFAULT].folder))
        features[row] = dict.fromkeys(own, source)
    folders = {row: table.root / "ratios" / one.label / row for row in features}
    keys = {row: _key(table, of_row, own) for row, of_row in features.items()}
    missing = [row for row in features if not is_done(folders[row], keys[row])]
    suite, size = table.suite, table.recipe.sizes.test
    inputs = {task: suite.load(task, "test", size).inputs for task in own} if missing else {}
    arguments = {
        (row, task): (
            features[row][task],
            own[task],
            inputs[task],
            suite.tasks[task].max_tokens,
            EVIDENCE_BATCH,
        )
        for row in missing
        for task in sorted(own)
    }
    ratios = pool.map("ratios", arguments, label="null-space ratios")
    for row in missing:
        with whole_folder(folders[row], info={"key": keys[row]}) as folder:
            save_file({t: ratios[row, t][1].contiguous() for t in sorted(own)}, folder / RATIOS)
            write_json(folder / MODULES, {t: list(ratios[row, t][0]) for t in own})
    return folders


def _key(
    table: Table,
    features: Mapping[str, AdapterSource | None],
    own: Mapping[str, AdapterSource],
) -> str:
    """Return what identifies one row's ratios."""
    size = table.recipe.sizes.test
    tests = {task: table.suite.split_hash(task, "test", size) for task in own}
    pairs = {t: (s.fingerprint if s else None, own[t].fingerprint) for t, s in features.items()}
    return sha256_of([VERSION, table.session.key, tests, pairs])


def read_ratios(folder: Path) -> RowRatios:
    """Read one row's ratios back; an InputError if the folder is not intact."""
    read_manifest(folder)
    return RowRatios(read_json(folder / MODULES), load_file(folder / RATIOS))
