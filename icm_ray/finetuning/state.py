"""Training state that a killed run continues from: one safetensors file, replaced whole."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

STATE = "state.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def save_state(
    scratch: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    losses: list[float],
) -> None:
    """Write parameters, AdamW's moments and the losses so far."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"value/{name}"] = parameter.detach().contiguous()
        for moment in MOMENTS:
            tensors[f"{moment}/{name}"] = optimizer.state[parameter][moment]
    temporary = scratch / f".{STATE}.tmp"
    save_file(tensors, temporary, metadata={"losses": json.dumps(losses)})
    temporary.replace(scratch / STATE)


def load_state(
    scratch: Path, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> list[float]:
    """Restore a saved state in place and return its losses; an empty list starts afresh."""
    path = scratch / STATE
    if not path.is_file():
        return []
    try:
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            losses = json.loads(file.metadata()["losses"])
        values = {name: stored[f"value/{name}"].reshape(p.shape) for name, p in parameters.items()}
        moments = {name: {m: stored[f"{m}/{name}"] for m in MOMENTS} for name in parameters}
    except (SafetensorError, KeyError, TypeError, RuntimeError):
        path.unlink()  # cut off by a full disk, or not ours; the steps are simply trained again
        return []
    for name, parameter in parameters.items():
        parameter.data.copy_(values[name])
        optimizer.state[parameter] = moments[name]
    return losses
