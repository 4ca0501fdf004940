"""What each Ray Train worker does: its share of a step's tasks, through DeepSpeed's engine.

The engine makes the only update. Workers see the same table and draw by (seed, step, task), so a
step's gradient is the same sum however its tasks are split. Checkpoints are DeepSpeed's own, which
are pickles: they are read from the run's own storage alone, and only if every file still has the
sha256 its writer noted.
"""

import contextlib
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from icm_ray.base_model.placing import Place
from icm_ray.base_model.shared_base import SharedBase
from icm_ray.config import EngineSpec, FusionSpec, Resources
from icm_ray.distributed.progress import bar
from icm_ray.errors import InputError
from icm_ray.files import read_json, sha256_of_file, write_json
from icm_ray.fusion.base_side import BaseSide
from icm_ray.fusion.data import FusionTable
from icm_ray.fusion.meta import PARTS, MetaTraining
from icm_ray.fusion.train import History, is_lost, learning_rate, optimizer_of
from icm_ray.fusion_vae.layout import Layout
from icm_ray.learning.inputs import TaskInputs
from icm_ray.linalg.threads import kernel_threads

FORMAT = 1
"""Of a checkpoint; another one is refused by its number, before anything is unpickled."""
TAG = "engine"
VAE = "vae.safetensors"
TABLE = "checkpoints"
COLUMNS = ("loss", *PARTS)


@dataclass(frozen=True)
class FusionOrder:
    """One training, the same for every worker.

    Attributes:
        spec: Network, losses and stages.
        engine: DeepSpeed's part.
        layout: What the table's vectors mean.
        tasks: Adapters and inputs of every task; empty if no step runs the base.
        base: The base in the object store; None if no step runs it.
        resources: Device, threads and dtype of a worker.
        seed: Keys the network's weights and every draw.
    """

    spec: FusionSpec
    engine: EngineSpec
    layout: Layout
    tasks: Sequence[TaskInputs]
    base: SharedBase | None
    resources: Resources
    seed: int


def train_worker(config: dict[str, Any]) -> None:
    """Train, as `TorchTrainer` calls it in each worker; `config` holds a reference to the order."""
    import ray
    from ray import train

    order: FusionOrder = ray.get(config["order"])
    rank = train.get_context().get_world_rank()
    sign = Path(config["signs"]) / str(rank)
    sign.touch()
    # Or each report, and each reading of the table, is told once a worker.
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    with kernel_threads(order.resources.threads), warnings.catch_warnings():
        # DeepSpeed calls collectives that torch means to rename; nothing a user can act on.
        warnings.simplefilter("ignore", FutureWarning)
        meta = _meta(order, _table(train.get_dataset_shard(TABLE)))
        engine = _engine(meta, order)
        history = _resumed(engine, train.get_checkpoint(), rank)
        _train(engine, meta, order, history, rank, sign)


def _table(shard: Any) -> FusionTable:
    """Return the whole data set; it is not split, since mixtures are of all tasks' checkpoints."""
    import pyarrow as pa

    batches = shard.iter_batches(batch_format="pyarrow", batch_size=None)
    return FusionTable.from_arrow(pa.concat_tables(list(batches)))


def _meta(order: FusionOrder, table: FusionTable) -> MetaTraining:
    side = None
    if order.base is not None:
        device, dtype = order.resources.device, order.resources.dtype
        side = BaseSide(order.base.load(Place(device, dtype)), order.tasks)
    return MetaTraining.build(order.spec, order.layout, table, side, order.seed)


def _engine(meta: MetaTraining, order: FusionOrder) -> Any:
    """Return DeepSpeed's engine around the VAE, with torch's AdamW and no op that is compiled."""
    if order.resources.device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    import deepspeed.ops

    if order.resources.device == "cpu":
        # Or it would build a shared-memory op with the machine's compiler, for minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine, *_ = deepspeed.initialize(
        model=meta,
        optimizer=optimizer_of(meta),
        config=_settings(order),
        dist_init_required=False,
    )
    return engine


@contextlib.contextmanager
def alone(meta: MetaTraining, order: FusionOrder) -> Iterator[Callable[[int], dict[str, float]]]:
    """Lend what makes a step as a worker does that has no others, in this very process."""
    import torch.distributed as dist

    os.environ.setdefault("LOCAL_RANK", "0")  # as Ray Train tells its workers
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group(order.resources.backend, store=store, rank=0, world_size=1)
    try:
        yield partial(_step, _engine(meta, order), meta)
    finally:
        dist.destroy_process_group()


def _settings(order: FusionOrder) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 1,  # a micro step's tasks come as arguments
        "gradient_accumulation_steps": order.engine.accumulation,
        "gradient_clipping": order.spec.clip,
        "zero_optimization": {"stage": order.engine.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "torch_autocast": {
            "enabled": order.engine.precision == "bfloat16",
            "dtype": order.engine.precision,
        },
        "steps_per_print": 10**9,
    }


def _train(
    engine: Any, meta: MetaTraining, order: FusionOrder, history: History, rank: int, sign: Path
) -> None:
    from ray import train

    steps, options = order.spec.steps, order.engine
    shown = bar(steps, "train fusion") if rank == 0 else contextlib.nullcontext()
    with shown as drawn:
        if drawn:
            drawn.reach(len(history))
        while len(history) < steps and not is_lost(history):  # on every worker; the driver says so
            history.append(_step(engine, meta, len(history)))
            sign.touch()  # the driver ends a training without signs of life
            done = len(history)
            if is_lost(history) or done % options.checkpoint_every == 0 or done == steps:
                _report(engine, meta, history, rank)
            elif done % options.report_every == 0:
                train.report({"step": done, **history[-1]})
            if drawn:
                drawn.reach(done)
                if done % options.report_every == 0 or done == steps:
                    parts = ", ".join(f"{name} {history[-1][name]:.4g}" for name in COLUMNS)
                    print(f"step {done}/{steps}: {parts}")


def _step(engine: Any, meta: MetaTraining, step: int) -> dict[str, float]:
    """Make one step; return "loss" and its parts as means over all of the step's tasks."""
    import torch.distributed as dist

    rank, world = dist.get_rank(), dist.get_world_size()
    names, parts = meta.tasks_of(step), engine.gradient_accumulation_steps()
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(meta.spec, step)
    sums = torch.zeros(len(COLUMNS), dtype=torch.float64, device=meta.device)
    for part in range(parts):
        mine = names[rank::world][part::parts]
        # ZeRO 2 pairs gradients of workers in the order in which they come, so a worker without a
        # task runs one too, for nothing.
        losses = engine(step, mine or names[:1])
        # The engine averages over workers and parts; this makes it the mean over tasks.
        engine.backward(losses["loss"] * (len(mine) * world * parts / len(names)))
        engine.step()
        told = torch.stack([losses[name].detach().double() for name in COLUMNS])
        sums += told * len(mine) / len(names)
    dist.all_reduce(sums)
    return dict(zip(COLUMNS, sums.tolist(), strict=True))


def _report(engine: Any, meta: MetaTraining, history: History, rank: int) -> None:
    """Hand Ray Train a checkpoint: every worker's shard, the VAE by itself, and the history."""
    from ray import train

    with tempfile.TemporaryDirectory(prefix="icm_ray-fusion-") as name:
        folder = Path(name)
        engine.save_checkpoint(name, tag=TAG)
        if rank == 0:
            save_file({n: t.cpu().contiguous() for n, t in _state(meta).items()}, folder / VAE)
        known = [  # JSON has no NaN
            {name: value if math.isfinite(value) else None for name, value in step.items()}
            for step in history
        ]
        told = {"format": FORMAT, "history": known, "optimizer_bytes": optimizer_bytes(engine)}
        write_json(folder / f"progress-{rank}.json", told)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        hashes = {path.relative_to(folder).as_posix(): sha256_of_file(path) for path in files}
        write_json(folder / f"hashes-{rank}.json", hashes)
        last = {"step": len(history), **history[-1]}
        train.report(last, checkpoint=train.Checkpoint.from_directory(folder))


def _resumed(engine: Any, checkpoint: Any, rank: int) -> History:
    """Set the engine to the run's last checkpoint, if there is one; return the history so far."""
    if checkpoint is None:
        return []
    with checkpoint.as_directory() as name:
        folder = Path(name)
        check_hashes(folder)
        history = read_progress(folder / f"progress-{rank}.json")["history"]
        engine.load_checkpoint(name, tag=TAG)
        return history


def read_progress(path: Path) -> dict[str, Any]:
    """Return what a worker noted in a checkpoint; InputError if another version wrote it."""
    notes = read_json(path)
    if (found := notes.get("format", 1)) != FORMAT:
        raise InputError(
            f"{path}: checkpoint of format {found} but {FORMAT} is expected. Go on with the "
            "version of icm_ray that wrote it, or remove the training folder beside the output."
        )
    return notes


def check_hashes(folder: Path) -> None:
    """Raise InputError unless every file of a checkpoint is as its writer noted."""
    noted = [read_json(path) for path in sorted(folder.glob("hashes-*.json"))]
    listed = {name: digest for hashes in noted for name, digest in hashes.items()}
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*.pt")}
    wrong = sorted(found - set(listed))  # nothing is unpickled that no worker wrote
    wrong += [
        name
        for name, digest in listed.items()
        if not (folder / name).is_file() or sha256_of_file(folder / name) != digest
    ]
    if wrong or not noted:
        raise InputError(
            f"{folder}: {wrong[0] if wrong else 'hashes'}: not as it was written. Remove the "
            "training folder beside the output and run the same command again."
        )


def optimizer_bytes(engine: Any) -> int:
    """Return the bytes of the moments this worker keeps."""
    inner = getattr(engine.optimizer, "optimizer", engine.optimizer)
    moments = [t for state in inner.state.values() for t in state.values()]
    return sum(t.numel() * t.element_size() for t in moments if torch.is_tensor(t) and t.dim())


def _state(meta: MetaTraining) -> dict[str, Tensor]:
    return meta.vae.state_dict()
