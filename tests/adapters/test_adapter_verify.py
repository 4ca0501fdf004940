"""The proof of a written folder finds what was tampered with."""

import json
import warnings

import pytest
import torch
from adapter_samples import CASES, small_model
from safetensors.torch import load_file, save_file

from icm_ray.adapters import (
    open_adapter,
    save_adapter,
    verify_forward,
    verify_with_peft,
    verify_written,
)
from icm_ray.errors import InputError

both_readers = pytest.mark.parametrize("verify", [verify_written, verify_with_peft])


@both_readers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_every_layer_type_is_proven(make_peft, tmp_path, case, dtype, verify):
    kind, options = CASES[case]
    adapter = open_adapter(make_peft(kind, **options)[0]).load()
    save_adapter(adapter, tmp_path / "out", dtype=dtype)
    measured = verify(tmp_path / "out", adapter)
    assert measured["modules"] == len(adapter.modules)
    assert (measured["max_relative_error"] <= 1e-6) == (dtype == torch.float32)


def edit_config(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def without_last(tensors):
    return {key: value for key, value in tensors.items() if "layers.2" not in key}


FIRST_A = "base_model.model.layers.0.q.lora_A.weight"
TAMPERED = {
    "alpha": (lambda f: edit_config(f, lora_alpha=6), "layers.0.q: {} another change"),
    "one alpha": (
        lambda f: edit_config(f, alpha_pattern={"layers.1.q": 9}),
        "layers.1.q: {} another change",
    ),
    "rslora": (lambda f: edit_config(f, use_rslora=True), "layers.0.q: {} another change"),
    "zeroed": (
        lambda f: edit_tensors(f, lambda t: {k: v * 0 for k, v in t.items()}),
        "(relative error 1.0e+00)",
    ),
    "narrower": (
        lambda f: edit_tensors(f, lambda t: {**t, FIRST_A: t[FIRST_A][:, :-1].clone()}),
        "layers.0.q: (",
    ),
    "missing": (lambda f: edit_tensors(f, without_last), "layers.2.q: missing but expected"),
    "unexpected": (
        lambda f: edit_tensors(
            f, lambda t: {**t, **{k.replace("s.2", "s.3"): v + 1 for k, v in t.items()}}
        ),
        "layers.3.q: not expected",
    ),
}


@pytest.mark.parametrize(
    ("verify", "reader"), [(verify_written, "the file holds"), (verify_with_peft, "PEFT computes")]
)
@pytest.mark.parametrize("case", TAMPERED)
def test_tampering_is_found(adapter_of, tmp_path, case, verify, reader):
    tamper, text = TAMPERED[case]
    adapter = adapter_of([2, 2, 2])
    save_adapter(adapter, tmp_path / "out")
    verify(tmp_path / "out", adapter)
    tamper(tmp_path / "out")
    with pytest.raises(InputError) as error:
        verify(tmp_path / "out", adapter)
    assert text.format(reader) in str(error.value)


@both_readers
def test_a_zero_adapter_is_proven_to_be_zero(adapter_of, tmp_path, verify):
    adapter = adapter_of([0, 0])
    save_adapter(adapter, tmp_path / "out")
    assert verify(tmp_path / "out", adapter)["max_relative_error"] == 0
    with pytest.raises(InputError, match="another change"):
        verify(tmp_path / "out", adapter_of([1, 1]))


@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("conv")])
def test_the_base_models_outputs_are_those_of_the_algebra(make_peft, tmp_path, case):
    kind, options = CASES[case]
    adapter = open_adapter(make_peft(kind, **options)[0]).load()
    save_adapter(adapter, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small_model(kind).save_pretrained(tmp_path / "base")
        measured = verify_forward(tmp_path / "out", adapter, tmp_path / "base")
    assert measured["relative_error"] <= 1e-5
    assert measured["change_from_base"] > 1e-3


def test_a_wrong_base_and_a_wrong_change_are_found(make_peft, tmp_path):
    adapter = open_adapter(make_peft("bert", r=2, target_modules=["query"])[0]).load()
    other = open_adapter(
        make_peft("bert", r=2, target_modules=["query"], seed=1, folder="other")[0]
    ).load()
    save_adapter(adapter, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        small_model("bert").save_pretrained(tmp_path / "bert")
        small_model("gpt2").save_pretrained(tmp_path / "gpt2")
        with pytest.raises(InputError, match="outputs differ by"):
            verify_forward(tmp_path / "out", other, tmp_path / "bert")
        with pytest.raises(InputError, match="lacks modules of the adapter"):
            verify_forward(tmp_path / "out", adapter, tmp_path / "gpt2")
        with pytest.raises(InputError, match=r"nowhere/config\.json: missing"):
            verify_forward(tmp_path / "out", adapter, tmp_path / "nowhere")
