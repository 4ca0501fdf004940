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
