"""Train one expert: PEFT LoRA plus a linear head if the task has one, resumable, repeatable."""

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from icm_ray.base_model.loading import Base
from icm_ray.checkpoint import Checkpoint
from icm_ray.config import ExpertSet, LoRARecipe, Training
from icm_ray.evaluation.answers import answer_of
from icm_ray.evaluation.heads import Head
from icm_ray.finetuning.trajectory import Trajectory
from icm_ray.seeding import generator, seed_for
from icm_ray.suites.tasks import Examples, Task

STATE = "state.safetensors"

Report = Callable[[int, float], None]
"""Called after each step with the step's number and its loss."""


@dataclass(frozen=True)
class ExpertJob:
    """Everything that decides an expert's bytes.

    Attributes:
        task: What to learn.
        lora: Rank, alpha and target modules.
        training: Steps, batch, learning rates.
        which: Initialisation of A ("shared" over tasks, or "own") and seed.
    """

    task: Task
    lora: LoRARecipe
    training: Training
    which: ExpertSet


@dataclass(frozen=True)
class TrainedExpert:
    """What training gives back.

    Attributes:
        model: The PEFT model holding the final adapter.
        head: The head, frozen from here on; None if the base answers by itself.
        losses: Loss of every step.
    """

    model: Any
    head: Head | None
    losses: list[float]


def train_expert(
    base: Base,
    job: ExpertJob,
    train: Examples,
    start: Head | None,
    scratch: Path,
    report: Report | None = None,
) -> TrainedExpert:
    """Train adapter and head together on examples of one task.

    The head starts as the linear probe of the frozen base (arXiv 2202.10054: features are bent
    less that way), and both learning rates fall linearly to zero. Dropout is off and every draw
    is keyed by (seed, task, step): a run that was killed continues from its last state in
    `scratch` to the same bytes as an unbroken one.

    Args:
        base: Frozen base; its weights stay untouched.
        job: Task and hyper-parameters.
        train: At least `job.training.batch` examples.
        start: The probe's head, whose target scale is kept; None for tasks without a head.
        scratch: Folder for resumable state and the trajectory; kept until the caller is done.
        report: Told about each step.
    """
    model, head = _start(base, job, start)
    answer, scale = answer_of(job.task), (start.mean, start.std) if start else (0.0, 1.0)
    targets = torch.from_numpy((train.targets - scale[0]) / scale[1])
    make_batch = answer.batches(base, train, job.task)
    headed = dict(head.named_parameters()) if head is not None else {}
    # The names PEFT writes to disk lack the name of the adapter inside the model.
    trained = {n.replace(".default", ""): p for n, p in model.named_parameters() if p.requires_grad}
    rates = (job.training.lora_lr, job.training.head_lr)
    optimizer = torch.optim.AdamW(
        [{"params": list(trained.values())}, *([{"params": list(headed.values())}] * bool(headed))],
        weight_decay=0.0,
    )
    parameters = {**trained, **{f"head.{n}": p for n, p in headed.items()}}
    trajectory = Trajectory(scratch, job.training.steps, job.training.checkpoints)
    checkpoint = Checkpoint(scratch / STATE)  # the folder's name has the run's key
    losses: list[float] = checkpoint.load(parameters, optimizer)
    for step in range(len(losses), job.training.steps):
        rows = batch_rows(job, len(train), step)
        # The adapter's layers are inside the base's own modules by now.
        value = answer.loss(base, head, make_batch(rows), targets[rows], job.task)
        for group, rate in zip(optimizer.param_groups, rates):  # noqa: B905 - a head is optional
            group["lr"] = rate * (1 - step / job.training.steps)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(float(value.detach()))
        trajectory.offer(step + 1, losses[-1], trained)
        if (step + 1) % job.training.save_every == 0:
            checkpoint.save(parameters, optimizer, losses)
        if report:
            report(step + 1, losses[-1])
    final = None
    if head is not None:
        weight, bias = (part.detach().cpu().clone() for part in (head.weight, head.bias))
        final = Head(weight, bias, *scale)
    return TrainedExpert(model, final, losses)


def _start(base: Base, job: ExpertJob, start: Head | None) -> tuple[Any, nn.Linear | None]:
    from peft import LoraConfig, get_peft_model

    own = job.task.name if job.which.init == "own" else "every task"
    config = LoraConfig(
        r=job.lora.rank,
        lora_alpha=job.lora.alpha,
        target_modules=job.lora.targets,
        lora_dropout=0.0,
        task_type="FEATURE_EXTRACTION" if base.whole is base.model else "CAUSAL_LM",
    )
    with _seeded("lora", job.which.seed, own):
        model = get_peft_model(base.whole, config)
    if start is None:
        return model.eval(), None
    head = nn.Linear(base.d_model, job.task.outputs, device="meta").to_empty(device="cpu")
    head.weight.data.copy_(start.weight)
    head.bias.data.copy_(start.bias)
    head = head.to(next(base.model.parameters()).device)
    # Evaluation mode turns dropout off, so training has no draws beyond the batches.
    return model.eval(), head


def batch_rows(job: ExpertJob, examples: int, step: int) -> list[int]:
    """Return the examples of one step: a fresh shuffle each epoch, keyed by task and seed."""
    size = job.training.batch
    rows: list[int] = []
    position = step * size
    while len(rows) < size:
        epoch, offset = divmod(position, examples)
        key = generator("order", job.which.seed, job.task.name, epoch)
        order = torch.randperm(examples, generator=key)
        rows += order[offset : offset + size - len(rows)].tolist()
        position = step * size + len(rows)
    return rows


@contextlib.contextmanager
def _seeded(*key: object) -> Iterator[None]:
    """Seed torch's global generator, which PEFT draws from, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(*key))
        yield


def save_adapter_of(model: Any, folder: Path, dtype: torch.dtype, base_name: str) -> None:
    """Write the trained adapter with PEFT itself, in `dtype`, naming its base."""
    from safetensors.torch import load_file, save_file

    config = model.peft_config["default"]
    config.base_model_name_or_path = base_name
    if isinstance(config.target_modules, set):
        # PEFT writes the set in the order of string hashes, another one in every process.
        config.target_modules = sorted(config.target_modules)
    with contextlib.redirect_stdout(io.StringIO()):
        # Looking for resized embeddings would ask a hub about the base; there are none here.
        model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card would be taken for ours
    weights = folder / "adapter_model.safetensors"
    tensors: dict[str, Tensor] = load_file(weights)
    save_file({n: t.to(dtype) for n, t in tensors.items()}, weights, metadata={"format": "pt"})


def losses_summary(losses: list[float]) -> dict[str, float]:
    """Return first and last loss, averaged over up to ten steps each."""
    few = min(10, len(losses))
    return {"first_loss": float(np.mean(losses[:few])), "last_loss": float(np.mean(losses[-few:]))}
