"""The plain loop that trains a Fusion-VAE in one process; a distributed one must equal it."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from icm_ray.config import FusionSpec
from icm_ray.errors import RecipeError
from icm_ray.fusion.diagnosis import diagnosis
from icm_ray.fusion.meta import MetaTraining
from icm_ray.fusion_vae.model import FusionModel
from icm_ray.linalg.threads import kernel_threads
from icm_ray.types import Adapter

STATE = "fusion_training.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")

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
    scratch: Path | None = None,
    key: str = "",
    progress: Progress | None = None,
) -> History:
    """Train `meta.vae` in place through both stages.

    Args:
        meta: The network, what it is trained on, and `spec`.
        threads: Kernel threads.
        scratch: Existing folder for resumable state, or None.
        key: Identifies the run; only a run with the same key resumes from `scratch`.
        progress: Told about each step.

    Returns:
        "loss" and its parts for every step, those before a resumption included.
    """
    spec, optimizer = meta.spec, optimizer_of(meta)
    history = _resumed(meta, optimizer, scratch, key) if scratch else []
    with kernel_threads(threads):
        while len(history) < spec.steps and not is_lost(history):
            step = len(history)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(spec, step)
            optimizer.zero_grad()
            found = meta(step, meta.tasks_of(step))
            found["loss"].backward()
            torch.nn.utils.clip_grad_norm_(meta.vae.parameters(), spec.clip)
            optimizer.step()
            history.append({name: float(value.detach()) for name, value in found.items()})
            if scratch and len(history) % spec.save_every == 0:
                _save(meta, optimizer, history, scratch, key)
            if progress:
                progress(len(history), history[-1]["loss"])
    return history


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
    told = meta.spec.representation.task_vectors
    return diagnosis(replace(model, report={"task_vectors": told}), table, adapters, history)


def _save(
    meta: MetaTraining,
    optimizer: torch.optim.AdamW,
    history: History,
    folder: Path,
    key: str,
) -> None:
    tensors: dict[str, Tensor] = {}
    for name, leaf in meta.vae.named_parameters():
        tensors[f"value/{name}"] = leaf.detach().cpu().contiguous()
        for moment, value in optimizer.state.get(leaf, {}).items():
            tensors[f"{moment}/{name}"] = value.cpu()
    temporary = folder / f".{STATE}.tmp"
    save_file(tensors, temporary, metadata={"key": key, "history": json.dumps(history)})
    temporary.replace(folder / STATE)


def _resumed(meta: MetaTraining, optimizer: torch.optim.AdamW, folder: Path, key: str) -> History:
    """Set network and optimiser to a saved state of the same run, if there is one."""
    path = folder / STATE
    if not path.is_file():
        return []
    try:
        with safe_open(path, framework="pt") as file:
            stored: Mapping[str, Tensor] = {n: file.get_tensor(n) for n in file.keys()}  # noqa: SIM118
            notes = file.metadata()
        history = json.loads(notes["history"])
    except (SafetensorError, KeyError, TypeError, ValueError):
        path.unlink()  # cut off by a full disk, or not ours; the steps are simply made again
        return []
    if notes["key"] != key:
        return []
    for name, leaf in meta.vae.named_parameters():
        leaf.data.copy_(stored[f"value/{name}"])
        if f"exp_avg/{name}" in stored:
            optimizer.state[leaf] = {
                m: stored[f"{m}/{name}"].to(leaf.device if m != "step" else "cpu") for m in MOMENTS
            }
    return history
