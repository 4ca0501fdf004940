"""Quantised bases, run as they are stored by the library that packed them."""

from collections.abc import Mapping
from typing import Any

import torch

from icm_ray.adapters.base_folder import BaseFolder, named
from icm_ray.adapters.base_skeleton import SAFELY, own_class, run_as_stored, silent
from icm_ray.errors import InputError


def load_packed(base: BaseFolder, plan: Mapping[str, str], dtype: torch.dtype) -> Any:
    """Return a quantised base, its linear layers packed.

    Args:
        base: The checked folder.
        plan: Device by module; see `placing.device_plan`.
        dtype: Precision of what is not packed, and of what passes between layers.

    Raises:
        InputError: its library cannot run it on these devices, or weights are missing.
    """
    with named(base.path, "no loadable base model"), silent():
        model, found = own_class(base.config).from_pretrained(
            base.path, dtype=dtype, device_map=dict(plan), output_loading_info=True, **SAFELY
        )
    if missing := sorted(found["missing_keys"]):
        raise InputError(
            f"{base.path}: {missing[0]}: not among the weights of a quantised base but expected. "
            "Quantise it again."
        )
    for weight in model.parameters():  # transformers leaves them as they are stored
        if weight.is_floating_point():
            weight.data = weight.data.to(dtype)
    run_as_stored(model)
    return model
