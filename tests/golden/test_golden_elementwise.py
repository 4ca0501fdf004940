"""Element-wise merges beside numbers of the reference implementations, masks given as evidence."""

from typing import Any

import pytest
import torch
from test_golden import MANIFEST, adapters, stored

import icm_ray

WEIGHTS = [0.4, 0.3, 0.2, 0.1]

# How each case is asked for here: method and parameters.
OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "knots_repo_ties_k30": ("ties", {"density": 0.3, "scale": 0.3}),
    "full_ties_perlayer_k50": ("ties", {"density": 0.5, "scale": 0.6, "preset": "core"}),
    "nsc_Ties_k30_mean": (
        "ties",
        {"density": 0.3, "scale": 0.4, "preset": "nsc", "aggregate": "mean"},
    ),
    "peft_ties_equal_d50": ("ties", {"density": 0.5, "weights": WEIGHTS, "preset": "peft"}),
    "peft_ties_svd_mixed_d20": ("ties", {"density": 0.2, "weights": WEIGHTS, "preset": "peft_svd"}),
    "peft_magprune_svd_mixed_d30": ("magnitude_prune", {"density": 0.3, "weights": WEIGHTS}),
    "peft_dare_linear_svd_mixed": ("dare", {"density": 0.6, "weights": WEIGHTS}),
    "peft_dare_ties_svd_mixed": (
        "dare_ties",
        {"density": 0.6, "weights": WEIGHTS, "preset": "peft_svd"},
    ),
    "knots_repo_dare_ties": ("dare_ties", {"density": 0.8, "scale": 0.6}),
}


@pytest.mark.parametrize("name", OURS)
def test_merges_equal_the_reference(adapter_around, name: str) -> None:
    case, theirs = MANIFEST["cases"][name], stored(MANIFEST["cases"][name]["file"])
    method, params = OURS[name]
    masks = {key: mask for key, mask in theirs.items() if ".mask." in key}
    given = adapters(case, adapter_around)
    rank = case["params"].get("svd_rank", "exact")
    result = icm_ray.merge(given, method, params=params, evidence=masks or None, output_rank=rank)
    for layer, factors in result.adapter.modules.items():
        torch.testing.assert_close(factors.delta(), theirs[f"{layer}.delta"], **case["tolerance"])
        if name == "peft_ties_equal_d50":
            torch.testing.assert_close(factors.a, theirs[f"{layer}.lora_A"], **case["tolerance"])
            torch.testing.assert_close(factors.b, theirs[f"{layer}.lora_B"], **case["tolerance"])
