"""Baselines of 2025 and 2026 beside numbers of their reference implementations."""

import pytest
import torch
from test_golden import MANIFEST, adapters, stored

import icm_ray

# Of each case: the ridge, and which of its tensors is what a LoRA of rank R can hold.
WUDI = [
    ("wudi_equal_long", 1e-9, "delta_in_span"),
    ("derived_weight_gram_equal", 0.1, "delta_eps0.1"),
    ("derived_weight_gram_equal", 0.01, "delta_eps0.01"),
]


@pytest.mark.parametrize(("name", "ridge", "tensor"), WUDI)
def test_wudi_is_where_the_reference_ends(adapter_around, name, ridge, tensor) -> None:
    case = MANIFEST["cases"][name]
    given = adapters(case, adapter_around)
    result = icm_ray.merge(given, "wudi", params={"ridge": ridge})
    for layer, factors in result.adapter.modules.items():
        # The reference's own tolerance is that of Adam's path; the closed form is not on it.
        torch.testing.assert_close(
            factors.delta(), stored(case["file"])[f"{layer}.{tensor}"], rtol=1e-4, atol=1e-5
        )


SVC = {"svc_ta03_equal": 0.3, "svc_ta10_small_a1": 1.0}


@pytest.mark.parametrize("name", SVC)
def test_svc_equals_the_reference_after_task_arithmetic(adapter_around, name) -> None:
    case = MANIFEST["cases"][name]
    theirs, given = stored(case["file"]), adapters(case, adapter_around)
    params = {"alpha": case["params"]["alpha"], "weights": [SVC[name]] * len(given)}
    result = icm_ray.merge(given, "svc", params=params)
    for layer, factors in result.adapter.modules.items():
        torch.testing.assert_close(factors.delta(), theirs[f"{layer}.delta"], **case["tolerance"])


ESM = [
    ("esm_small", "vit", "delta"),
    ("esm_roberta_small", "roberta", "delta"),
    ("esm_equal_keep4", "vit", "delta"),
    ("esm_fewinputs_pin", "vit", "delta_clean"),
]


@pytest.mark.parametrize(("name", "preset", "tensor"), ESM)
def test_esm_equals_both_codes(adapter_around, name, preset, tensor) -> None:
    case = MANIFEST["cases"][name]
    theirs = stored(case["file"])
    grams = {
        key.replace(".X.", ".gram."): x.T @ x / len(x) for key, x in theirs.items() if ".X." in key
    }
    given = adapters(case, adapter_around)
    result = icm_ray.merge(given, "esm", params={"preset": preset}, evidence=grams)
    for layer, factors in result.adapter.modules.items():
        expected = theirs[f"{layer}.{tensor}"]
        torch.testing.assert_close(factors.delta(), expected, **case["tolerance"])
    if tensor == "delta_clean":  # the reference counts a part of a norm twice, and we do not
        wrong = theirs["blk0.q_proj.delta_reference"]
        found = result.adapter.modules["blk0.q_proj"].delta()
        assert not torch.allclose(found, wrong, **case["tolerance"])


CTM = {
    "ctm_ties_mixed": {},
    "ctm_iso_equal": {"inner": "iso_c", "by_norm": 0.0, "scale": 1.0},
    "ctm_dare_ties_equal": {"inner": "dare_ties", "density": 0.7, "trim_density": 0.25},
}


@pytest.mark.parametrize("name", CTM)
def test_compress_then_merge_equals_the_reference_with_a_converged_fit(
    adapter_around, name
) -> None:
    case = MANIFEST["cases"][name]
    theirs, given = stored(case["file"]), adapters(case, adapter_around)
    masks = {
        f"{key.removesuffix('.masks')}.mask.task{task}": mask
        for key, stack in theirs.items()
        if key.endswith(".masks")
        for task, mask in enumerate(stack)
    }
    params = {"rank": 4, **CTM[name]}
    result = icm_ray.merge(given, "compress_then_merge", params=params, evidence=masks or None)
    for layer, factors in result.adapter.modules.items():
        assert factors.rank == 4
        torch.testing.assert_close(factors.delta(), theirs[f"{layer}.delta"], **case["tolerance"])


def test_the_published_stop_is_far_from_the_end_of_the_fit(adapter_around) -> None:
    case = MANIFEST["cases"]["ctm_ties_mixed_published"]
    theirs, given = stored(case["file"]), adapters(case, adapter_around)
    result = icm_ray.merge(given, "compress_then_merge", params={"rank": 4})
    for layer, factors in result.adapter.modules.items():
        expected = theirs[f"{layer}.delta"]
        assert 1e-3 < float((factors.delta() - expected).norm() / expected.norm()) < 2e-2
