"""Null-space ratios of merges, and of experts as they were trained: what the pictures need.

ratios/<set>/<row>/     every test input's ratio, by task and module
ratios/<set>-training/  ratios at kept steps of the experts' training
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from icm_ray.config import PipelineRecipe
from icm_ray.distributed.actors import AdapterSource
from icm_ray.distributed.cluster import run_bounded
from icm_ray.distributed.progress import bar
from icm_ray.files import is_done, read_json, read_manifest, sha256_of, whole_folder, write_json
from icm_ray.finetuning.trajectory import evenly_spaced, read_trajectory, unflatten
from icm_ray.learning.tasks import EVIDENCE_BATCH
from icm_ray.report.data import BASE, EXPERT
from icm_ray.suites import Suite
from icm_ray.types import Adapter, LoRAFactors
from icm_ray.workflows.pipeline.results import DEFAULT, SetResults

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


def ratios_of_rows(
    recipe: PipelineRecipe,
    suite: Suite,
    one: SetResults,
    actors: Sequence[Any],
    base: str,
    root: Path,
) -> dict[str, Path]:
    """Return folders of ratios by learned row, of the experts and of the base; one set's.

    Every input of a task is measured against the A of the task's own expert.
    """
    if not one.learned:
        return {}
    own = {file.name: AdapterSource.of(file) for file in one.files()}
    features: dict[str, Mapping[str, AdapterSource | None]] = {
        BASE: dict.fromkeys(own),
        EXPERT: own,
    }
    for row in one.learned:
        merged = one.merged[row, DEFAULT]
        source = AdapterSource(row, str(merged.folder), merged.fingerprint)
        features[row] = dict.fromkeys(own, source)
    size = recipe.sizes.test
    data = {task: (suite.load(task, "test", size).inputs, suite.tasks[task]) for task in own}
    told = {task: suite.split_hash(task, "test", size) for task in own}
    folders = {row: root / "ratios" / one.label / row for row in features}
    keys = {
        row: sha256_of(
            [
                VERSION,
                base,
                told,
                {t: (s.fingerprint if s else None, own[t].fingerprint) for t, s in of_row.items()},
            ]
        )
        for row, of_row in features.items()
    }
    missing = [row for row in features if not is_done(folders[row], keys[row])]

    def call(row: str, task: str) -> Any:
        inputs, spec = data[task]
        given = (features[row][task], own[task], inputs, spec.max_tokens, EVIDENCE_BATCH)
        return lambda actor: actor.ratios.remote(*given)

    calls = {(row, task): call(row, task) for row in missing for task in sorted(own)}
    timeout = recipe.resources.timeout_seconds
    with bar(len(calls), "null-space ratios") as drawn:
        found = run_bounded(actors, calls, timeout=timeout, done=lambda _key, _found: drawn.add())
    for row in missing:
        with whole_folder(folders[row], info={"key": keys[row]}) as folder:
            save_file({t: found[row, t][1].contiguous() for t in sorted(own)}, folder / RATIOS)
            write_json(folder / MODULES, {t: list(found[row, t][0]) for t in own})
    return folders


def read_ratios(folder: Path) -> RowRatios:
    """Read one row's ratios back; an InputError if the folder is not intact."""
    read_manifest(folder)
    return RowRatios(read_json(folder / MODULES), load_file(folder / RATIOS))


@dataclass(frozen=True)
class CheckpointSource:
    """An expert as it was at one step of its training.

    Attributes:
        expert: The finished expert, which gives everything but the weights.
        folder: Its trajectory.
        step: Which checkpoint.
    """

    expert: AdapterSource
    folder: str
    step: int

    @property
    def name(self) -> str:
        """The task's name."""
        return self.expert.name

    def load(self) -> Adapter:
        """Read the checkpoint."""
        table, layout = read_trajectory(Path(self.folder))
        place = table["step"].to_pylist().index(self.step)
        flat = np.asarray(table["adapter"][place].values, dtype=np.float32)
        tensors = unflatten(flat, layout)
        adapter = self.expert.load()
        modules = {
            path: LoRAFactors(
                _of(tensors, path, "lora_A"),
                _of(tensors, path, "lora_B") * factors.scaling,
                factors.scaling,
            )
            for path, factors in adapter.modules.items()
        }
        key = sha256_of([adapter.fingerprint, self.step])
        return replace(adapter, modules=modules, fingerprint=key)


def _of(tensors: Mapping[str, Tensor], path: str, kind: str) -> Tensor:
    return next(t for name, t in tensors.items() if name.endswith(f"{path}.{kind}.weight"))


def training_ratios(
    recipe: PipelineRecipe, suite: Suite, one: SetResults, actors: Sequence[Any], root: Path
) -> dict[str, dict[int, float]]:
    """Return the mean expert ratio over modules at kept steps, by task that has a trajectory."""
    trajectories = root / "trajectories" / one.label
    files = [f for f in one.files() if one.learned and (trajectories / f.name).is_dir()]
    if not files:
        return {}
    limit = min(TRAINING_INPUTS, recipe.sizes.calibration)
    inputs = {f.name: suite.load(f.name, "calibration", limit) for f in files}
    folder = root / "ratios" / f"{one.label}-training"
    content = {f.name: [f.fingerprint(), inputs[f.name].fingerprint] for f in files}
    key = sha256_of([VERSION, content])
    if not is_done(folder, key):
        calls = {
            (file.name, step): _call(
                CheckpointSource(
                    AdapterSource.of(file), str((trajectories / file.name).absolute()), step
                ),
                (inputs[file.name].inputs, suite.tasks[file.name].max_tokens, EVIDENCE_BATCH),
            )
            for file in files
            for step in _steps(trajectories / file.name)
        }
        found = run_bounded(actors, calls, timeout=recipe.resources.timeout_seconds)
        means: dict[str, dict[str, float]] = {file.name: {} for file in files}
        for (task, step), evidence in found.items():
            values = evidence.expert_ratios.values()
            means[task][str(step)] = sum(values) / len(values)
        with whole_folder(folder, info={"key": key}) as target:
            write_json(target / MEANS, means)
    told = read_json(folder / MEANS)
    return {task: {int(s): v for s, v in of_task.items()} for task, of_task in told.items()}


def _steps(trajectory: Path) -> list[int]:
    """Return up to `CHECKPOINTS` of the kept steps, evenly spaced."""
    steps = read_trajectory(trajectory)[0]["step"].to_pylist()
    return evenly_spaced(steps, CHECKPOINTS)


def _call(source: CheckpointSource, given: tuple[Any, ...]) -> Any:
    return lambda actor: actor.evidence.remote(source, *given)
