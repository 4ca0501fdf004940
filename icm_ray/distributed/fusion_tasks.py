"""Several Fusion-VAEs at the same time, each whole in one Ray task and without DeepSpeed."""

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import ray
from torch import Tensor

from icm_ray.adapters import AdapterFile
from icm_ray.checkpoint import scratch_folder
from icm_ray.config import FusionSpec
from icm_ray.distributed.cluster import MAX_RETRIES, run_tasks
from icm_ray.distributed.progress import bar
from icm_ray.distributed.session import Session
from icm_ray.errors import RecipeError
from icm_ray.files import RUN_FILE, write_json
from icm_ray.fusion.serial import Checkpoints, runs_base, train_fusion
from icm_ray.fusion.store import save_fusion
from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.learner import Run
from icm_ray.linalg.threads import kernel_threads


@dataclass(frozen=True)
class FusionTask:
    """One training.

    Attributes:
        spec: Representation, network, losses and stages.
        files: The finished adapter of every task.
        trajectories: Folder of checkpoints by task; empty for the adapters alone.
        vectors: `(d,)` task vector by task.
        tasks: Inputs of every task; empty if no step runs the base.
        key: Identifies the training.
        label: Shown by the progress bar.
    """

    spec: FusionSpec
    files: Sequence[AdapterFile]
    trajectories: Mapping[str, Path]
    vectors: Mapping[str, Tensor]
    tasks: Sequence[TaskInputs]
    key: str
    label: str


def train_fusions(session: Session, trainings: Mapping[Path, FusionTask]) -> None:
    """Train Fusion-VAEs into folders, at the same time where there is room; resumable."""
    arguments = {folder: (session, task, folder) for folder, task in trainings.items()}
    run_tasks(_train, arguments, session.resources)


@ray.remote(max_retries=MAX_RETRIES)
def _train(session: Session, task: FusionTask, folder: Path) -> None:
    started, threads = time.process_time(), session.resources.threads
    scratch = scratch_folder(folder, "training", task.key)
    adapters = [file.load() for file in task.files]
    known = Checkpoints.read(adapters, task.trajectories, task.vectors)
    with (
        bar(task.spec.steps, f"fusion {task.label}", every=3.0) as drawn,
        kernel_threads(threads),
    ):
        through = None
        if runs_base(task.spec):
            through = session.load_base(), task.tasks
        run = Run(session.seed, threads, scratch, task.key)
        try:
            model = train_fusion(
                task.spec, adapters, known, through, run, progress=lambda n, _: drawn.reach(n)
            )
        except RecipeError:  # of other settings there is nothing to resume
            shutil.rmtree(scratch)
            raise
    save_fusion(model, folder, {"key": task.key})
    write_json(folder / RUN_FILE, {"cpu_seconds": time.process_time() - started})
    shutil.rmtree(scratch)
