"""Class: values and element types that no merge may carry on."""

import pytest
import torch
from corpus_cases import A0, B0, WEIGHTS, accepted, every, hold, refused, warned, with_tensors
from corpus_cases import third_tensors as good

LAST = max(good())


def spoilt(name: str, tensor: torch.Tensor):
    return with_tensors({name: tensor})


def with_one(name: str, value: float):
    """Return what sets the last value of a tensor."""
    tensor = good()[name].clone()
    tensor.view(-1)[-1] = value
    return spoilt(name, tensor)


def not_finite(name: str, value: float):
    return refused(f"{name}: NaN or infinity", with_one(name, value), WEIGHTS)


def of_type(dtype: torch.dtype, told: str):
    return refused(
        f"layers.0.q: A: {told} but one of F16", spoilt(A0, good()[A0].to(dtype)), WEIGHTS
    )


def stored_as(dtype: torch.dtype):
    return accepted(with_tensors({name: tensor.to(dtype) for name, tensor in good().items()}))


CASES = {
    "nan_A": not_finite(A0, float("nan")),
    "nan_last_tensor": not_finite(LAST, float("nan")),
    "inf_B": not_finite(B0, float("inf")),
    "inf_negative": not_finite(B0, float("-inf")),
    "overflow_by_scaling": not_finite(B0, 3e38),
    "huge_finite": warned("1e+18", spoilt(B0, torch.full((6, 2), 1e30)), WEIGHTS),
    "all_zero_B": warned("all-zero", spoilt(B0, torch.zeros(6, 2)), WEIGHTS),
    "int8_tensor": of_type(torch.int8, "I8"),
    "int64_tensor": of_type(torch.int64, "I64"),
    "bool_tensor": of_type(torch.bool, "BOOL"),
    "fp8_tensor": of_type(torch.float8_e4m3fn, "F8_E4M3"),
    "ok_float64": stored_as(torch.float64),
    "ok_float16": stored_as(torch.float16),
    "ok_bfloat16": stored_as(torch.bfloat16),
    "mixed_types": warned(
        "element types BF16, F32 are mixed", spoilt(A0, good()[A0].to(torch.bfloat16)), WEIGHTS
    ),
}


@pytest.mark.timeout(60)
@every(CASES)
def test_values(case, tmp_path):
    hold(case, tmp_path)
