"""Train experts in parallel: one Ray task an expert, each resumable."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ray
import torch

from icm_ray.checkpoint import scratch_folder
from icm_ray.distributed.cluster import MAX_RETRIES, run_tasks
from icm_ray.distributed.progress import bar
from icm_ray.distributed.session import Session
from icm_ray.evaluation.experts import ADAPTER, HEAD, METRICS, TRAJECTORIES
from icm_ray.evaluation.heads import Head
from icm_ray.files import whole_folder, write_json
from icm_ray.finetuning.expert import (
    ExpertJob,
    TrainedExpert,
    losses_summary,
    save_adapter_of,
    train_expert,
)
from icm_ray.finetuning.trajectory import FOLDER
from icm_ray.linalg.threads import kernel_threads
from icm_ray.suites import Examples


@dataclass(frozen=True)
class ExpertOrder:
    """One expert to train.

    Attributes:
        job: Task and hyper-parameters.
        train: Its examples.
        head: What its head starts as; None if the base answers by itself.
        data: sha256 of the task's data file.
        base_name: What the adapter's config names as its base.
        dtype: Element type of the adapter's file.
        key: Identifies the expert.
    """

    job: ExpertJob
    train: Examples
    head: Head | None
    data: str
    base_name: str
    dtype: str
    key: str


def train_experts(session: Session, orders: Mapping[Path, ExpertOrder]) -> None:
    """Train experts into folders, each whole or not at all.

    The checkpoints of `<root>/experts/<set>/<task>/` go to `<root>/trajectories/<set>/<task>/`.
    """
    arguments = {folder: (session, order, folder) for folder, order in orders.items()}
    run_tasks(_train, arguments, session.resources)


@ray.remote(max_retries=MAX_RETRIES)
def _train(session: Session, order: ExpertOrder, folder: Path) -> None:
    job, scratch = order.job, scratch_folder(folder, "training", order.key)
    name = f"finetune {job.which.label} {job.task.name}"
    with (
        bar(job.training.steps, name, every=3.0) as drawn,
        kernel_threads(session.resources.threads),
    ):
        base = session.load_base()
        trained = train_expert(
            base, job, order.train, order.head, scratch, lambda step, _loss: drawn.reach(step)
        )
    _write(trained, order, folder, scratch, session.shared.fingerprint)
    shutil.rmtree(scratch)


def _write(
    trained: TrainedExpert, order: ExpertOrder, folder: Path, scratch: Path, base: str
) -> None:
    job = order.job
    info = {
        "key": order.key,
        "task": job.task.name,
        "set": job.which.model_dump(),
        "lora": job.lora.model_dump(),
        "training": job.training.model_dump(),
        "base": base,
        "data": order.data,
    }
    # Apart from the expert, because it is twenty times as large and only some methods train on it.
    trajectory = folder.parents[2] / TRAJECTORIES / folder.parent.name / folder.name
    with whole_folder(trajectory, info=info) as target:
        shutil.copytree(scratch / FOLDER, target, dirs_exist_ok=True)
    with whole_folder(folder, info=info) as target:
        dtype = getattr(torch, order.dtype)
        save_adapter_of(trained.model, target / ADAPTER, dtype, order.base_name)
        if trained.head is not None:
            trained.head.save(target / HEAD)
        write_json(target / METRICS, {"losses": trained.losses, **losses_summary(trained.losses)})
