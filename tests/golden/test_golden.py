"""Our merges beside numbers that the reference implementations gave, within their tolerances.

`data/manifest.json` names the source, version or commit of every case. A case marked
`expect: differs` pins a defect of a reference; our result must be the right one there.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import icm_ray
from icm_ray.files import sha256_of_file
from icm_ray.types import LoRAFactors

DATA = Path(__file__).parent / "data"
MANIFEST = json.loads((DATA / "manifest.json").read_text())
SETS = {entry["file"]: entry for entry in MANIFEST["adapter_sets"].values()}

# How each case is asked for here: method, parameters, output rank.
OURS: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "peft_linear_equal": ("linear", {"weights": [0.4, 0.3, 0.2, 0.1]}, None),
    "peft_cat_mixed": ("cat", {"weights": [0.4, 0.3, 0.2, 0.1]}, None),
    "peft_svd_mixed_r3": ("svd", {"weights": [0.4, 0.3, 0.2, 0.1]}, 3),
    "peft_cat_rslora": ("cat", {"weights": [0.4, 0.3, 0.2, 0.1]}, None),
    "core_sum": ("task_arithmetic", {"scale": 0.4}, None),
    "nsc_Linear": ("linear", {"preset": "nsc", "scale": 0.4}, None),
}


@cache
def stored(file: str) -> dict[str, Tensor]:
    return load_file(DATA / file)


def adapters(case: dict[str, Any], adapter_around) -> list[Any]:
    """Return the case's adapters, scaling folded in as loading does."""
    file = case["inputs"].split()[0]
    entry, tensors = SETS[file], stored(file)
    made = []
    for task, (rank, alpha) in enumerate(zip(entry["ranks"], entry["lora_alpha"], strict=True)):
        scaling = alpha / rank**0.5 if case["params"].get("rslora") else alpha / rank
        modules = {
            layer: LoRAFactors(
                tensors[f"task{task}.{layer}.lora_A"],
                tensors[f"task{task}.{layer}.lora_B"] * scaling,
                scaling,
            )
            for layer in entry["layers"]
        }
        made.append(adapter_around(f"task{task}", modules))
    return made


def test_the_data_are_those_of_the_manifest() -> None:
    assert {path.name for path in DATA.glob("*.safetensors")} == set(MANIFEST["sha256"])
    for file, digest in MANIFEST["sha256"].items():
        assert sha256_of_file(DATA / file) == digest, file
    for name, case in MANIFEST["cases"].items():
        source = case.get("source", {})
        assert (
            case["method"] == "input"
            or source.get("version")
            or source.get("commit")
            or ("NOT reference code" in source["function"])
        ), name


@pytest.mark.parametrize("name", OURS)
def test_merges_equal_the_reference(adapter_around, name: str) -> None:
    case = MANIFEST["cases"][name]
    method, params, rank = OURS[name]
    given = adapters(case, adapter_around)
    result = icm_ray.merge(given, method, params=params, output_rank=rank)
    for layer, factors in result.adapter.modules.items():
        theirs = stored(case["file"])[f"{layer}.delta"]
        if case.get("expect") == "differs":
            expected = sum(
                w * x.modules[layer].delta() for w, x in zip(params["weights"], given, strict=True)
            )
            torch.testing.assert_close(factors.delta(), expected, **case["tolerance"])
            # PEFT leaves rsLoRA on, so its result is too large by the root of its rank.
            factor = case["merged_scaling"][layer]
            assert factor == pytest.approx(factors.rank**0.5)
            torch.testing.assert_close(theirs, expected * factor, **case["tolerance"])
        else:
            torch.testing.assert_close(factors.delta(), theirs, **case["tolerance"])


def test_linear_equals_peft_s_factors_too(adapter_around) -> None:
    case = MANIFEST["cases"]["peft_linear_equal"]
    method, params, _ = OURS["peft_linear_equal"]
    result = icm_ray.merge(adapters(case, adapter_around), method, params=params)
    for layer, factors in result.adapter.modules.items():
        theirs = stored(case["file"])
        torch.testing.assert_close(factors.a, theirs[f"{layer}.lora_A"], **case["tolerance"])
        torch.testing.assert_close(factors.b, theirs[f"{layer}.lora_B"], **case["tolerance"])
