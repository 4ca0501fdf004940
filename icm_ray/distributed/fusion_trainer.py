"""Ray Train around the workers of `fusion_worker`: storage, time-outs, retries, resuming.

A trial of Ray Tune may call `train_fusion_on_ray` too, with Tune's TuneReportCallback. The trial
then must hold none of the CPUs its workers wait for: let it ask for a custom resource alone.
"""

import contextlib
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.state import list_nodes
from ray.util.state.exception import RayStateApiException
from safetensors.torch import load_file

from icm_ray.config import Resources
from icm_ray.distributed.faults import as_ours
from icm_ray.distributed.fusion_worker import (
    TABLE,
    VAE,
    FusionOrder,
    check_hashes,
    read_progress,
    train_worker,
)
from icm_ray.errors import ClusterError, ICMRayError, InputError, RecipeError
from icm_ray.fusion.data import FusionTable, write_table
from icm_ray.fusion.train import History, check_kept
from icm_ray.fusion_vae.network import FusionVAE, build_vae

START_SECONDS = "600"
"""How long workers may take to start; Ray Train's own minute is short on a busy machine."""
CLEANER = "PlacementGroupCleanerCallback"
"""Ray Train's class of what frees the workers' resources if its controller is killed."""
STATE_SECONDS = 10
"""How long the cluster's State API may take to answer."""
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
"""How workers on a device exchange gradients."""


def check_resources(resources: Resources) -> None:
    """Raise RecipeError, with all problems, if DeepSpeed's workers cannot run on `resources`."""
    wanted = BACKENDS.get(resources.device)
    if wanted is None:
        raise RecipeError(
            f"resources.device: {resources.device} but one of {', '.join(BACKENDS)} is expected."
        )
    problems = []
    if resources.backend != wanted:
        problems.append(
            f"resources.backend: {resources.backend} but {wanted} is expected on device "
            f"{resources.device}."
        )
    gpus = float(resources.device == "cuda")  # DeepSpeed counts a node's devices by its workers
    if resources.offload:
        problems.append("resources.offload: true but DeepSpeed holds the base whole. Leave it out.")
    if resources.gpus_per_worker != gpus:
        problems.append(
            f"resources.gpus_per_worker: {resources.gpus_per_worker:g} but {gpus:g} is expected "
            f"on device {resources.device}: DeepSpeed spreads no base. Give each worker as many."
        )
    if problems:
        raise RecipeError(problems)


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
        RecipeError: the loss is no longer a number, or DeepSpeed cannot run on the resources.
        InputError: `scratch` is not this user's alone, or a checkpoint is not as it was written.
        ClusterError: workers were lost, or did not start, more often than `max_failures`.
    """
    check_resources(order.resources)
    _own(scratch)
    write_table(table, scratch / f"{TABLE}.parquet")
    signs = scratch / "signs"
    signs.mkdir(exist_ok=True)
    with _settings(order.resources.timeout_seconds):
        data = ray.data.read_parquet(str((scratch / f"{TABLE}.parquet").absolute())).materialize()
        resources = order.resources
        trainer = _Trainer(
            worker,
            train_loop_config={"order": ray.put(order), "signs": str(signs.absolute())},
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
                failure_config=train.FailureConfig(
                    max_failures=order.engine.max_failures,
                    controller_failure_limit=order.engine.max_failures,  # of starting workers
                ),
                checkpoint_config=train.CheckpointConfig(num_to_keep=2),
                # Or it says every report a second time, and each checkpoint once a worker.
                logging_config=train.LoggingConfig(log_level="WARNING"),
                callbacks=list(callbacks),
            ),
        )
        with _watched(signs, order.resources.timeout_seconds, trainer.stop) as is_dead:
            try:
                result = trainer.fit()
            except BaseException as error:
                if is_dead():
                    raise ClusterError(
                        "train fusion: no worker answered for twice resources.timeout_seconds "
                        f"({order.resources.timeout_seconds}). Checkpoints are kept; run the same "
                        "command again to resume."
                    ) from error
                if isinstance(error, train.TrainingFailedError):
                    raise _told(error) from error
                trainer.stop()  # Ctrl-C: workers would train on for a session that stays open
                raise
    return _trained(order, table, result.checkpoint)


@contextlib.contextmanager
def _watched(signs: Path, seconds: int, stop: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """End a training whose workers have given no sign of life for twice `seconds`.

    Ray Train itself notices a worker that hangs in the middle of its steps, after `seconds`, and
    starts all of them anew; one that hangs while it starts it would wait for without end. Only
    changes of the signs count, so clocks of other nodes do not matter.
    """
    over, dead = threading.Event(), threading.Event()

    def watch() -> None:
        seen, since = None, time.monotonic()
        while not over.wait(min(1.0, seconds / 4)):
            now = {sign.name: sign.stat().st_mtime_ns for sign in signs.iterdir()}
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > 2 * seconds:
                dead.set()
                stop()
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield dead.is_set
    finally:
        over.set()
        thread.join()


class _Trainer(TorchTrainer):
    """Leaves Ctrl-C to the caller; Ray's own handler would end the process with code 0."""

    controller: Any = None

    def _create_default_callbacks(self) -> list[Any]:
        # Ray's cleaner of placement groups asks the State API whether the controller lives. Without
        # that API, as in a local cluster, which ends with us, it can only complain, each second.
        found = super()._create_default_callbacks()
        if _has_state_api():
            return found
        return [one for one in found if type(one).__name__ != CLEANER]

    def _register_sigint_handler(self, controller: Any) -> None:
        self.controller = controller

    def stop(self) -> None:
        """End the training and its workers now."""
        if self.controller is not None:
            ray.kill(self.controller)


def _has_state_api() -> bool:
    # Named, or it would look for clusters of anybody on this machine.
    address = ray.get_runtime_context().gcs_address
    try:
        list_nodes(address, limit=1, timeout=STATE_SECONDS)
    except (RayStateApiException, ConnectionError):
        return False
    return True


def _own(folder: Path) -> None:
    """Make a folder of this user alone: what DeepSpeed saves there it unpickles when it resumes."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise InputError(
            f"{folder}: not a folder that only this user can use, which checkpoints to resume from "
            "have to be in. Remove it and run the same command again."
        )


def _told(error: train.TrainingFailedError) -> BaseException:
    """Return what ended a training: an error of ours as it was, anything else in one line."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause = as_ours(getattr(failure, "_base_exc", failure), "train fusion")
        if isinstance(cause, ICMRayError | OSError) and not isinstance(cause, ClusterError):
            return cause
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return ClusterError(
        f"train fusion: {lines[-1] if lines else type(error).__name__}. Checkpoints are "
        "kept; run the same command again to resume."
    )


def _trained(order: FusionOrder, table: FusionTable, checkpoint: Any) -> Trained:
    with checkpoint.as_directory() as name:
        folder = Path(name)
        check_hashes(folder)
        notes = [read_progress(path) for path in sorted(folder.glob("progress-*.json"))]
        vae = build_vae(order.spec.vae, order.layout.sizes, table.v.shape[1])
        vae.load_state_dict(load_file(folder / VAE))
    history = notes[0]["history"]
    check_kept(history)
    return Trained(vae, history, [one["optimizer_bytes"] for one in notes])


def _wants(order: FusionOrder) -> dict[str, float]:
    resources = order.resources
    wants = {"CPU": resources.cpus_per_worker, "GPU": resources.gpus_per_worker}
    if resources.memory_per_worker:
        wants["memory"] = resources.memory_per_worker
    return {name: amount for name, amount in {**wants, **resources.custom}.items() if amount}


ENVIRONMENT: Mapping[str, str] = {
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": START_SECONDS,
    # A worker that reports waits until the controller has looked; its own 2 s are many steps.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it logs what is printed, and prints it as well
}


@contextlib.contextmanager
def _settings(timeout: int) -> Iterator[None]:
    """Set what Ray Train reads from the environment, and keep Ray Data quiet.

    Args:
        timeout: Seconds after which a worker that does not answer is taken for dead.
    """
    wanted = {**ENVIRONMENT, "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": str(timeout)}
    before = {name: os.environ.get(name) for name in wanted}
    data, log = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    bars, level = data.enable_progress_bars, log.level
    try:
        for name, value in wanted.items():
            os.environ.setdefault(name, value)
        data.enable_progress_bars = False
        log.setLevel(logging.ERROR)  # it warns that its bars are off
        yield
    finally:
        data.enable_progress_bars = bars
        log.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
