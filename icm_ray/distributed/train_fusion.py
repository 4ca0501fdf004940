"""From adapters and trajectories to a trained Fusion-VAE: the driver of `jobs.train_fusion`."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from icm_ray.adapters import AdapterFile, open_all
from icm_ray.config import LearnSpec, ObjectiveSpec, TrainFusionRecipe
from icm_ray.distributed.actors import AdapterSource, adapter_actors
from icm_ray.distributed.cluster import connected, worker_count
from icm_ray.distributed.evidence import (
    EVIDENCE_BATCH,
    Inputs,
    gather_on_ray,
    inputs_key,
    load_inputs,
)
from icm_ray.distributed.fusion_engine import FusionOrder
from icm_ray.distributed.fusion_trainer import check_resources, train_fusion_on_ray
from icm_ray.distributed.learn import Readable, heads_key, task_inputs
from icm_ray.distributed.merge_jobs import base_folder, readable_of
from icm_ray.distributed.shared_base import SharedBase, share_base
from icm_ray.errors import InputError, RecipeError
from icm_ray.files import is_done, refuse_foreign, sha256_of, sha256_of_file
from icm_ray.fusion.data import FusionTable, samples_of
from icm_ray.fusion.meta import MetaTraining
from icm_ray.fusion.serial import HEAD_LOSSES, reads_heads, runs_base
from icm_ray.fusion.store import load_fusion, save_fusion
from icm_ray.fusion.train import finished
from icm_ray.planning import warn, warnings_of
from icm_ray.report.fusion_page import write_fusion_page
from icm_ray.types import Adapter
from icm_ray.vae.layout import Layout

VERSION = 1


def train_fusion_and_write(recipe: TrainFusionRecipe, target: Path) -> dict[str, Any]:
    """Train on the cluster and write the FusionModel that `method: icm_fusion` reads."""
    refuse_foreign(target)
    check_resources(recipe.resources)
    files = open_all([(r.name, Path(r.path)) for r in recipe.adapters], recipe.modules_to_save)
    names = [file.name for file in files]
    inputs = load_inputs(recipe.data, names)
    warn(warnings_of(files))
    readable = _readable(recipe, files)
    base = base_folder(recipe, recipe.base, recipe.revision)
    with connected(recipe.resources):
        shared = share_base(base)
        world = worker_count(recipe.resources, len(names))
        key = _key(recipe, files, inputs, readable, shared, world)
        if not is_done(target, key):
            _train(recipe, files, inputs, readable, base, shared, world, target, key)
    report = load_fusion(target).report
    warn(report["warnings"])
    errors = report["reconstruction_error"]
    print("relative error: " + ", ".join(f"{t} {e:.4f}" for t, e in errors.items()))
    print(f"KL {report['kl_total']:.2f} nats; {report['parameters']:,} parameters")
    page = target.with_name(f"{target.name}.report")
    write_fusion_page(report, page)
    outputs = {"evidence": str(target), "report": str(page / "index.html")}
    kept = ("reconstruction_error", "kl_total", "against_soup", "bytes", "optimizer_bytes")
    last = {name: values[-1] for name, values in report["history"].items()}
    return {"outputs": outputs, "last": last, **{name: report[name] for name in kept}}


def _train(
    recipe: TrainFusionRecipe,
    files: Sequence[AdapterFile],
    inputs: Inputs,
    readable: Mapping[str, Readable],
    base: Path,
    shared: SharedBase,
    world: int,
    target: Path,
    key: str,
) -> None:
    adapters = [file.load() for file in files]
    layout, table = _table(recipe, files, adapters, inputs, shared)
    through_base = runs_base(recipe.fusion)
    order = FusionOrder(
        recipe.fusion,
        recipe.engine,
        layout,
        task_inputs(files, inputs, readable, base, recipe.input_batch) if through_base else (),
        shared if through_base else None,
        recipe.resources,
        recipe.seed,
    )
    scratch = target.with_name(f".{target.name}.training-{key[:12]}")
    try:
        trained = train_fusion_on_ray(order, table, scratch, world)
    except RecipeError:  # of other settings there is nothing to resume
        shutil.rmtree(scratch, ignore_errors=True)
        raise
    meta = MetaTraining(trained.vae, recipe.fusion, layout, table, None, recipe.seed)
    model = finished(meta, trained.history, adapters)
    report = {**model.report, "optimizer_bytes": trained.optimizer_bytes}
    save_fusion(replace(model, report=report), target, {"key": key})
    shutil.rmtree(scratch)


def _readable(recipe: TrainFusionRecipe, files: Sequence[AdapterFile]) -> dict[str, Readable]:
    """Return heads and labels, if the inner loss reads them."""
    if not reads_heads(recipe.fusion):
        return {}
    kind: Any = HEAD_LOSSES[recipe.fusion.inner.loss]
    spec = LearnSpec(objective=ObjectiveSpec(kind=kind))
    return readable_of(recipe.heads, recipe.data, spec, list(files))


def _table(
    recipe: TrainFusionRecipe,
    files: Sequence[AdapterFile],
    adapters: Sequence[Adapter],
    inputs: Inputs,
    shared: SharedBase,
) -> tuple[Layout, FusionTable]:
    """Return the layout and the table of all checkpoints, task vectors gathered on the actors."""
    samples = [
        sample
        for adapter in adapters
        for sample in samples_of(adapter, _trajectory(recipe, adapter.name))
    ]
    kinds = {path: kind for adapter in adapters for path, kind in adapter.layouts.items()}
    layout = Layout.fit(recipe.fusion.representation, samples, kinds)
    with adapter_actors(shared, recipe.resources, len(files)) as actors:
        gathered = gather_on_ray(
            actors,
            [AdapterSource.of(file, recipe.modules_to_save) for file in files],
            inputs,
            batch=EVIDENCE_BATCH,
            timeout=recipe.resources.timeout_seconds,
        )
    vectors: dict[str, torch.Tensor] = {one.task: one.task_vector for one in gathered}
    return layout, FusionTable.of(layout, samples, vectors)


def _trajectory(recipe: TrainFusionRecipe, task: str) -> Path | None:
    return Path(recipe.trajectories) / task if recipe.trajectories else None


def _key(
    recipe: TrainFusionRecipe,
    files: Sequence[AdapterFile],
    inputs: Inputs,
    readable: Mapping[str, Readable],
    shared: SharedBase,
    world: int,
) -> str:
    """Return what identifies a trained model. DeepSpeed's shards fit one number of workers."""
    paths = [p for f in files for p in _checkpoints(recipe, f.name)]
    return sha256_of(
        {
            "version": VERSION,
            "fusion": recipe.fusion.model_dump(),
            "engine": recipe.engine.model_dump(include={"zero_stage", "accumulation", "precision"}),
            "adapters": {file.name: file.fingerprint() for file in files},
            "trajectories": [sha256_of_file(path) for path in paths],
            "inputs": {task: inputs_key(*told) for task, told in inputs.items()},
            "input_batch": recipe.input_batch,
            "heads": heads_key(readable),
            "base": shared.fingerprint,
            "seed": recipe.seed,
            "world": world,
            "threads": recipe.resources.threads,
        }
    )


def _checkpoints(recipe: TrainFusionRecipe, task: str) -> list[Path]:
    folder = _trajectory(recipe, task)
    found = sorted(folder.glob("*.parquet")) if folder else []
    if folder and not found:
        raise InputError(f"{folder}: no trajectory of {task} there. Train with jobs.finetune.")
    return found
