"""From adapters and trajectories to a trained Fusion-VAE: the driver of `jobs.train_fusion`."""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

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
from icm_ray.distributed.fusion_engine import (
    TABLE,
    VAE,
    FusionOrder,
    check_hashes,
    is_lost,
    train_worker,
)
from icm_ray.distributed.learn import task_inputs
from icm_ray.distributed.merge_jobs import base_folder, readable_of
from icm_ray.distributed.shared_base import SharedBase, share_base
from icm_ray.errors import ClusterError, InputError, RecipeError
from icm_ray.files import is_done, read_json, refuse_foreign, sha256_of, sha256_of_file
from icm_ray.fusion.data import FusionTable, samples_of, write_table
from icm_ray.fusion.meta import MetaTraining
from icm_ray.fusion.store import load_fusion, save_fusion
from icm_ray.fusion.train import History, finished
from icm_ray.planning import warn, warnings_of
from icm_ray.report.fusion_page import write_fusion_page
from icm_ray.types import Adapter
from icm_ray.vae.layout import Layout
from icm_ray.vae.network import FusionVAE, build_vae

VERSION = 1
READS = {"task": "supervised", "entropy": "entropy"}
"""Inner losses that read heads, by the learner's name of them."""
START_SECONDS = "600"
"""How long workers may take to start; Ray Train's own minute is short on a busy machine."""


@dataclass(frozen=True)
class Trained:
    """What Ray Train gives back.

    Attributes:
        vae: The network after the last step.
        history: "loss" and its parts for every step.
        optimizer_bytes: Of each worker.
    """

    vae: FusionVAE
    history: History
    optimizer_bytes: list[int]


def train_fusion_and_write(recipe: TrainFusionRecipe, target: Path) -> dict[str, Any]:
    """Train on the cluster and write the FusionModel that `method: icm_fusion` reads."""
    refuse_foreign(target)
    files = open_all([(r.name, Path(r.path)) for r in recipe.adapters], recipe.modules_to_save)
    names = [file.name for file in files]
    inputs = load_inputs(recipe.data, names)
    warn(warnings_of(files))
    base = base_folder(recipe, recipe.base, recipe.revision)
    with connected(recipe.resources):
        shared = share_base(base)
        world = worker_count(recipe.resources, len(names))
        key = _key(recipe, files, inputs, shared, world)
        if not is_done(target, key):
            _train(recipe, files, inputs, base, shared, world, target, key)
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
    base: Path,
    shared: SharedBase,
    world: int,
    target: Path,
    key: str,
) -> None:
    adapters = [file.load() for file in files]
    layout, table = _table(recipe, files, adapters, inputs, shared)
    runs_base = recipe.fusion.meta_steps and recipe.fusion.inner.loss != "reconstruction"
    readable = {}
    if recipe.fusion.inner.loss in READS:
        kind: Any = READS[recipe.fusion.inner.loss]
        spec = LearnSpec(objective=ObjectiveSpec(kind=kind))
        readable = readable_of(recipe.heads, recipe.data, spec, list(files))
    order = FusionOrder(
        recipe.fusion,
        recipe.engine,
        layout,
        task_inputs(files, inputs, readable, base, recipe.input_batch) if runs_base else (),
        shared if runs_base else None,
        recipe.resources,
        recipe.seed,
    )
    scratch = target.with_name(f".{target.name}.training-{key[:12]}")
    trained = train_fusion_on_ray(order, table, scratch, world)
    meta = MetaTraining(trained.vae, recipe.fusion, layout, table, None, recipe.seed)
    model = finished(meta, trained.history, adapters)
    model.report["optimizer_bytes"] = trained.optimizer_bytes
    save_fusion(model, target, {"key": key})
    shutil.rmtree(scratch)


def train_fusion_on_ray(
    order: FusionOrder,
    table: FusionTable,
    scratch: Path,
    world: int,
    callbacks: Sequence[Any] = (),
    worker: Callable[[dict[str, Any]], None] = train_worker,
) -> Trained:
    """Train a Fusion-VAE over the cluster; `fusion.train.train` is the loop it equals.

    Args:
        order: The training.
        table: Checkpoints of every task.
        scratch: Storage of the run, on a disk all nodes share; what it holds is resumed.
        world: Number of workers.
        callbacks: Ray Train's, such as Tune's TuneReportCallback.
        worker: What each worker runs.

    Raises:
        RecipeError: the loss is no longer a number.
        ClusterError: workers were lost more often than `max_failures`.
    """
    import ray
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    scratch.mkdir(parents=True, exist_ok=True)
    write_table(table, scratch / f"{TABLE}.parquet")
    with _environment():
        data = ray.data.read_parquet(str((scratch / f"{TABLE}.parquet").absolute())).materialize()
        resources = order.resources
        trainer = TorchTrainer(
            worker,
            train_loop_config={"order": ray.put(order)},
            datasets={TABLE: data},
            dataset_config=train.DataConfig(datasets_to_split=[]),
            scaling_config=train.ScalingConfig(
                num_workers=world,
                use_gpu=resources.gpus_per_worker > 0,
                resources_per_worker=_wants(order),
            ),
            torch_config=TorchConfig(
                backend=resources.backend, timeout_s=resources.timeout_seconds
            ),
            run_config=train.RunConfig(
                name="train",
                storage_path=str(scratch.absolute()),
                failure_config=train.FailureConfig(max_failures=order.engine.max_failures),
                checkpoint_config=train.CheckpointConfig(num_to_keep=2),
                callbacks=list(callbacks),
            ),
        )
        try:
            result = trainer.fit()
        except train.TrainingFailedError as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise ClusterError(
                f"train fusion: {lines[-1] if lines else type(error).__name__}. Checkpoints are "
                "kept; run the same command again to resume."
            ) from error
    return _trained(order, table, result.checkpoint)


def _trained(order: FusionOrder, table: FusionTable, checkpoint: Any) -> Trained:
    with checkpoint.as_directory() as name:
        folder = Path(name)
        check_hashes(folder)
        told = [read_json(path) for path in sorted(folder.glob("progress-*.json"))]
        vae = build_vae(order.spec.vae, order.layout.sizes, table.v.shape[1])
        vae.load_state_dict(load_file(folder / VAE))
    history = told[0]["history"]
    if is_lost(history):
        raise RecipeError(
            f"fusion: the loss is no number at step {len(history)}. Lower fusion.lr and "
            "fusion.meta_lr, or fusion.inner.lr."
        )
    return Trained(vae, history, [one["optimizer_bytes"] for one in told])


def _wants(order: FusionOrder) -> dict[str, float]:
    resources = order.resources
    wants = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    if resources.memory_per_worker:
        wants["memory"] = resources.memory_per_worker
    return {name: amount for name, amount in {**wants, **resources.custom}.items() if amount}


class _environment:
    """Ray Train's and Ray Data's settings that are read from the environment."""

    WANTED: Mapping[str, str] = {
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": START_SECONDS,
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    }

    def __enter__(self) -> None:
        self.before = {name: os.environ.get(name) for name in self.WANTED}
        for name, value in self.WANTED.items():
            os.environ.setdefault(name, value)

    def __exit__(self, *_error: object) -> None:
        for name, value in self.before.items():
            if value is None:
                os.environ.pop(name, None)


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
    shared: SharedBase,
    world: int,
) -> str:
    """Return what identifies a trained model. DeepSpeed's shards fit one number of workers."""
    paths = [p for f in files for p in _checkpoints(recipe, f.name)]
    return sha256_of(
        {
            "version": VERSION,
            "fusion": recipe.fusion.model_dump(),
            "engine": recipe.engine.model_dump(exclude={"checkpoint_every", "max_failures"}),
            "adapters": {file.name: file.fingerprint() for file in files},
            "trajectories": [sha256_of_file(path) for path in paths],
            "inputs": {task: inputs_key(*told) for task, told in inputs.items()},
            "input_batch": recipe.input_batch,
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
