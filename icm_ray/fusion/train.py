"""The plain loop that trains a Fusion-VAE in one process; a distributed one must equal it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from icm_ray.checkpoint import Checkpoint
from icm_ray.config import FusionSpec
from icm_ray.errors import RecipeError
from icm_ray.fusion.diagnosis import diagnosis
from icm_ray.fusion.meta import MetaTraining
from icm_ray.fusion_vae.model import FusionModel
from icm_ray.linalg.threads import kernel_threads
from icm_ray.types import Adapter

STATE = "fusion_training.safetensors"

History = list[dict[str, float]]
"""Loss and its parts, step by step."""
Progress = Callable[[int, float], None]
"""Called after each step with the step's number and its loss."""


def is_lost(history: History) -> bool:
    """Say whether the last loss is no number."""
    last = history[-1]["loss"] if history else 0.0
    return last is None or not math.isfinite(last)


def check_kept(history: History) -> None:
    """Raise RecipeError if the last loss is no number."""
    if is_lost(history):
        raise RecipeError(
            f"fusion: the loss is no number at step {len(history)}. Lower fusion.lr and "
            "fusion.meta_lr, or fusion.inner.lr."
        )


def learning_rate(spec: FusionSpec, step: int) -> float:
    """Return a step's rate: in each stage a linear rise, then half a cosine down to zero."""
    meta = step >= spec.vae_steps
    length = spec.meta_steps if meta else spec.vae_steps
    done = step - spec.vae_steps if meta else step
    rise = round(spec.warm_up * length)
    top = spec.meta_lr if meta else spec.lr
    if done < rise:
        return top * (done + 1) / rise
    return top * (1 + math.cos(math.pi * (done - rise) / max(length - rise, 1))) / 2


def optimizer_of(meta: MetaTraining) -> torch.optim.AdamW:
    """Return the optimiser of the reference loop."""
    spec = meta.spec
    return torch.optim.AdamW(meta.vae.parameters(), spec.lr, weight_decay=spec.weight_decay)


def train(
    meta: MetaTraining,
    *,
    threads: int = 1,
    checkpoint: Checkpoint | None = None,
    progress: Progress | None = None,
) -> History:
    """Train `meta.vae` in place through both stages.

    Args:
        meta: The network, what it is trained on, and `spec`.
        threads: Kernel threads.
        checkpoint: Where resumable state goes, or None.
        progress: Told about each step.

    Returns:
        "loss" and its parts for every step, those before a resumption included.
    """
    spec, optimizer = meta.spec, optimizer_of(meta)
    leaves = dict(meta.vae.named_parameters())
    history: History = checkpoint.load(leaves, optimizer) if checkpoint else []
    with kernel_threads(threads):
        while len(history) < spec.steps and not is_lost(history):
            history.append(train_step(meta, optimizer, len(history)))
            if checkpoint and len(history) % spec.save_every == 0 and not is_lost(history):
                checkpoint.save(leaves, optimizer, history)
            if progress:
                progress(len(history), history[-1]["loss"])
    return history


def train_step(meta: MetaTraining, optimizer: torch.optim.Optimizer, step: int) -> dict[str, float]:
    """Make one step, and return its loss and the loss's parts."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(meta.spec, step)
    optimizer.zero_grad()
    losses = meta(step, meta.tasks_of(step))
    losses["loss"].backward()
    torch.nn.utils.clip_grad_norm_(meta.vae.parameters(), meta.spec.clip)
    optimizer.step()
    return {name: float(value.detach()) for name, value in losses.items()}


def finished(meta: MetaTraining, history: History, adapters: Sequence[Adapter]) -> FusionModel:
    """Return the trained model with its latents and its report.

    Args:
        meta: After training, on any device.
        history: What `train` returned.
        adapters: The finished adapter of every task.
    """
    vae = meta.vae.cpu().eval().requires_grad_(False)
    table = meta.table
    rows = {adapter.name: table.final_of(adapter.name) for adapter in adapters}
    with torch.no_grad():
        latents = {
            task: vae.encode(table.x[row][None], table.v[row][None] / meta.v_scale)[0][0]
            for task, row in rows.items()
        }
    model = FusionModel(
        meta.layout,
        vae,
        meta.spec.vae,
        meta.v_scale,
        latents,
        {task: table.v[row] for task, row in rows.items()},
        {adapter.name: adapter.fingerprint for adapter in adapters},
    )
    which = meta.spec.representation.task_vectors
    return diagnosis(replace(model, report={"task_vectors": which}), table, adapters, history)
