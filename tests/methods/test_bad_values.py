"""Values a merge cannot use are told as an InputError, by every method, and never merged."""

import pytest
import torch

import icm_ray
from icm_ray import METHODS, InputError
from icm_ray.types import LoRAFactors

FREE = [name for name, row in METHODS.items() if row.needs is None and name != "negate_add"]


@pytest.fixture
def three(make_adapter):
    return [make_adapter(name, shapes={"l.0": (12, 9)}) for name in "abc"]


@pytest.mark.parametrize("method", FREE)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(three, adapter_around, method, value) -> None:
    whole = three[1].modules["l.0"]
    a = whole.a.clone()
    a[0, 0] = value
    bad = adapter_around("b", {"l.0": LoRAFactors(a, whole.b)})
    with pytest.raises(InputError, match="finite"):
        icm_ray.merge([three[0], bad, three[2]], method)


@pytest.mark.parametrize("method", [m for m in FREE if METHODS[m].is_dense and m != "emr"])
def test_deltas_that_overflow_are_refused(adapter_around, make_adapter, method) -> None:
    large = [
        adapter_around(name, {"l.0": LoRAFactors(f.a * 1e17, f.b * 1e17)})
        for name in "abc"
        for f in make_adapter(name, shapes={"l.0": (12, 9)}).modules.values()
    ]
    with pytest.raises(InputError, match="finite"):
        icm_ray.merge(large, method, params={"scale": 1e6}, output_rank="energy:0.9")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["soup", "ties", "knots_ties", "lora_lego"])
def test_other_element_types_are_merged_in_float32(three, adapter_around, method, dtype) -> None:
    def turned(to: torch.dtype) -> list:
        return [
            adapter_around(
                x.name, {m: LoRAFactors(f.a.to(to), f.b.to(to)) for m, f in x.modules.items()}
            )
            for x in three
        ]

    rounded = [
        adapter_around(
            x.name, {m: LoRAFactors(f.a.float(), f.b.float()) for m, f in x.modules.items()}
        )
        for x in turned(dtype)
    ]
    found = icm_ray.merge(turned(dtype), method).adapter.modules["l.0"]
    expected = icm_ray.merge(rounded, method).adapter.modules["l.0"]
    assert found.a.dtype == torch.float32
    torch.testing.assert_close(found.delta(), expected.delta())
