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
            for name, parameter in parameters.items():
                parameter.data.copy_(file.get_tensor(f"value/{name}"))
                optimizer.state[parameter] = {m: file.get_tensor(f"{m}/{name}") for m in MOMENTS}
            return json.loads(file.metadata()["losses"])
    except SafetensorError:
        path.unlink()  # cut off by a full disk; the steps are simply trained again
        return []
