"""Null-space ratios of merges, and of experts as they were trained: what the pictures need.

ratios/<set>/<row>/     every test input's ratio, by task and module
ratios/<set>-training/  ratios at kept steps of the experts' training
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from icm_ray.adapters import open_adapter
from icm_ray.distributed.actors import AdapterSource, CheckpointSource
from icm_ray.distributed.evidence import EVIDENCE_BATCH
from icm_ray.distributed.session import Pool
from icm_ray.evaluation.experts import TRAJECTORIES
from icm_ray.files import is_done, read_json, read_manifest, sha256_of, whole_folder, write_json
from icm_ray.finetuning.trajectory import evenly_spaced, read_trajectory
from icm_ray.report.data import BASE, EXPERT
from icm_ray.workflows.pipeline.table import DEFAULT, SetResults, Table

VERSION = 1
RATIOS, MODULES, MEANS = "ratios.safetensors", "modules.json", "means.json"
CHECKPOINTS, TRAINING_INPUTS = 8, 64


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


def training_ratios(table: Table, one: SetResults, pool: Pool) -> dict[str, dict[int, float]]:
    """Return the mean expert ratio over modules at kept steps, by task that has a trajectory."""
    place = table.root / TRAJECTORIES / one.label
    files = [f for f in one.proven() if one.learned and (place / f.name).is_dir()]
    if not files:
        return {}
    limit = table.recipe.sizes.calibration
    inputs = {
        f.name: table.suite.load(f.name, "calibration", limit).first(TRAINING_INPUTS) for f in files
    }
    folder = table.root / "ratios" / f"{one.label}-training"
    content = {f.name: [f.fingerprint, inputs[f.name].fingerprint] for f in files}
    key = sha256_of([VERSION, content])
    if not is_done(folder, key):
        arguments = {
            (file.name, step): (
                CheckpointSource(AdapterSource(file), (place / file.name).absolute(), step),
                inputs[file.name].inputs,
                table.suite.tasks[file.name].max_tokens,
                EVIDENCE_BATCH,
            )
            for file in files
            for step in _steps(place / file.name)
        }
        means: dict[str, dict[str, float]] = {file.name: {} for file in files}
        for (task, step), evidence in pool.map("evidence", arguments).items():
            ratios = evidence.expert_ratios.values()
            means[task][str(step)] = sum(ratios) / len(ratios)
        with whole_folder(folder, info={"key": key}) as target:
            write_json(target / MEANS, means)
    means = read_json(folder / MEANS)
    return {task: {int(s): v for s, v in of_task.items()} for task, of_task in means.items()}


def _steps(trajectory: Path) -> list[int]:
    """Return up to `CHECKPOINTS` of the kept steps, evenly spaced."""
    steps = read_trajectory(trajectory)[0]["step"].to_pylist()
    return evenly_spaced(steps, CHECKPOINTS)
