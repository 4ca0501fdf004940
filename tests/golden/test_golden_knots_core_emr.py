"""KnOTS, Core Space and EMR beside numbers of the reference implementations."""

from typing import Any

import pytest
import torch
from test_golden import MANIFEST, adapters, stored

import icm_ray
from icm_ray.merging.order import MergeRequest, plan_merge
from icm_ray.merging.passes import with_statistics

# How each case is asked for here: method, parameters, what of the case is given as evidence.
OURS: dict[str, tuple[str, dict[str, Any], str]] = {
    "knots_ties_k30_sum": ("knots_ties", {"density": 0.3, "scale": 0.3, "aggregate": "sum"}, ""),
    "nsc_KnOTS_k30_mean": (
        "knots_ties",
        {"density": 0.3, "scale": 0.4, "preset": "nsc", "aggregate": "mean"},
        ".U",
    ),
    "knots_dare_ties": ("knots_dare_ties", {"density": 0.9, "scale": 0.7}, ".mask."),
    "core_sum": ("core_space", {"inner": "task_arithmetic", "scale": 0.4}, ""),
    "core_ties_k50": ("core_space", {"inner": "ties", "density": 0.5, "scale": 0.6}, ""),
    "core_tsv_equal": ("core_space", {"inner": "tsv"}, ""),
    "core_iso_sum_mixed": ("core_space", {"inner": "iso_c"}, ""),
    "core_cart_mixed": ("core_space", {"inner": "cart", "cart_rank": 0.2, "cart_scale": 0.5}, ""),
    "core_dare_mixed": ("core_space", {"inner": "dare", "density": 0.7, "scale": 0.5}, ".mask."),
}


@pytest.mark.parametrize("name", OURS)
def test_merges_equal_the_reference(adapter_around, name: str) -> None:
    case, theirs = MANIFEST["cases"][name], stored(MANIFEST["cases"][name]["file"])
    method, params, kind = OURS[name]
    told = {key: tensor for key, tensor in theirs.items() if kind and kind in key}
    given = adapters(case, adapter_around)
    result = icm_ray.merge(given, method, params=params, evidence=told or None)
    for layer, factors in result.adapter.modules.items():
        torch.testing.assert_close(factors.delta(), theirs[f"{layer}.delta"], **case["tolerance"])


def test_equal_singular_values_of_the_merged_core(adapter_around) -> None:
    case = MANIFEST["cases"]["core_iso_sum_mixed"]
    params = {"inner": "task_arithmetic", "isotropize": True}
    result = icm_ray.merge(adapters(case, adapter_around), "core_space", params=params)
    for layer, factors in result.adapter.modules.items():
        theirs = stored(case["file"])[f"{layer}.delta"]
        torch.testing.assert_close(factors.delta(), theirs, **case["tolerance"])


def test_emr_equals_the_reference(adapter_around) -> None:
    case, theirs = MANIFEST["cases"]["emr"], stored("emr.safetensors")
    given = {one.name: one for one in adapters(case, adapter_around)}
    order = plan_merge(list(given.values()), MergeRequest("emr", output_rank="exact"))
    order = with_statistics(order, lambda task, module: given[task].modules[module])
    rescalers = order.statistics["rescaler"].float()
    torch.testing.assert_close(rescalers, theirs["rescalers"], **case["tolerance"])
    result = icm_ray.merge(list(given.values()), "emr", output_rank="exact")
    for layer, factors in result.adapter.modules.items():
        expected = theirs[f"{layer}.unified"]
        torch.testing.assert_close(factors.delta(), expected, **case["tolerance"])
        for task, adapter in result.per_task.items():
            own = adapter.modules[layer].delta()
            expected = theirs[f"{layer}.task_delta.{task}"]
            torch.testing.assert_close(own, expected, **case["tolerance"])
            kept = theirs[f"{layer}.mask.{task}"] != 0
            assert torch.equal(own.abs() > 1e-5, kept & (expected.abs() > 1e-5))
