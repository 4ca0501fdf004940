"""Train experts in parallel: one Ray task for each group that shares a forward pass, resumable."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
import torch

from icm_ray.checkpoint import scratch_folder
from icm_ray.distributed.cluster import run_tasks
from icm_ray.distributed.faults import MAX_RETRIES, blaming
from icm_ray.distributed.progress import bar
from icm_ray.distributed.session import Session
from icm_ray.evaluation.experts import ADAPTER, HEAD, METRICS, TRAJECTORIES
from icm_ray.files import is_done, whole_folder, write_json
from icm_ray.finetuning.expert import Lesson, TrainedExpert, losses_summary
from icm_ray.finetuning.training import train_experts
from icm_ray.finetuning.trajectory import FOLDER
from icm_ray.linalg.threads import kernel_threads


@dataclass(frozen=True)
class ExpertOrder:
    """One expert to train.

    Attributes:
        lesson: Task, hyper-parameters, examples and what its head starts as.
        folder: Where it goes, `<root>/experts/<set>/<task>/`.
        data: sha256 of the task's data file.
        base_name: What the adapter's config names as its base.
        dtype: Element type of the adapter's file.
        key: Identifies the expert.
    """

    lesson: Lesson
    folder: Path
    data: str
    base_name: str
    dtype: str
    key: str


def train_groups(session: Session, groups: Mapping[Path, Sequence[ExpertOrder]]) -> None:
    """Train groups of experts into their folders, each whole or not at all.

    The checkpoints of `<root>/experts/<set>/<task>/` go to `<root>/trajectories/<set>/<task>/`.

    Args:
        session: The base, and what each worker gets.
        groups: By the folder that a group's unfinished state is beside: experts that share each
            forward pass. Those that are done are trained with the others and not written again.
    """
    arguments = {place: (session, orders, place) for place, orders in groups.items()}
    with blaming(lambda place: [order.lesson.job.task.name for order in groups[place]]):
        run_tasks(_train, arguments, session.resources)


@ray.remote(max_retries=MAX_RETRIES)
def _train(session: Session, orders: Sequence[ExpertOrder], place: Path) -> None:
    scratch = scratch_folder(place, "training", orders[0].key)
    lessons = [order.lesson for order in orders]
    job = lessons[0].job
    tasks = " ".join(lesson.job.task.name for lesson in lessons)
    with (
        bar(job.training.steps, f"finetune {job.which.label} {tasks}", every=3.0) as drawn,
        kernel_threads(session.resources.threads),
    ):
        base = session.load_base()
        trained = train_experts(base, lessons, scratch, lambda step, _losses: drawn.reach(step))
    for order, expert in zip(orders, trained, strict=True):
        if not is_done(order.folder, order.key):
            _write(expert, order, scratch, session.shared.fingerprint)
    shutil.rmtree(scratch)


def _write(trained: TrainedExpert, order: ExpertOrder, scratch: Path, base: str) -> None:
    job, folder = order.lesson.job, order.folder
    info = {"key": order.key, **job.described, "base": base, "data": order.data}
    if order.lesson.adapter is not None:
        info["start"] = order.lesson.adapter.fingerprint
    # Apart from the expert, because it is twenty times as large and only some methods train on it.
    trajectory = folder.parents[2] / TRAJECTORIES / folder.parent.name / folder.name
    with whole_folder(trajectory, info=info) as target:
        shutil.copytree(scratch / job.task.name / FOLDER, target, dirs_exist_ok=True)
    with whole_folder(folder, info=info) as target:
        trained.save_adapter(target / ADAPTER, getattr(torch, order.dtype), order.base_name)
        if trained.head is not None:
            trained.head.save(target / HEAD)
        write_json(target / METRICS, {"losses": trained.losses, **losses_summary(trained.losses)})
