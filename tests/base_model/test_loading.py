"""The base: loaded strictly, rebuilt without a copy, the same every time."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from icm_ray.base_model.loading import build_base, fingerprint_weights, load_base, load_weights
from icm_ray.errors import InputError


@pytest.fixture
def copy(tiny_bert, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bert, tmp_path / "base"))


def test_rebuilding_shares_the_memory(tiny_bert) -> None:
    weights = load_weights(tiny_bert)
    for array in weights.values():
        array.flags.writeable = False  # as the object store hands them out
    base = build_base(tiny_bert, weights, device="cpu", dtype="float32")
    for name, tensor in base.model.state_dict().items():
        assert tensor.data_ptr() == weights[name].ctypes.data, name
    assert base.d_model == 16
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())


def test_a_rebuilt_base_computes_the_same(tiny_bert) -> None:
    from transformers import AutoModel

    ids = torch.tensor([[2, 5, 6, 3]])
    plain = AutoModel.from_pretrained(tiny_bert).eval()
    with torch.no_grad():
        expected = plain(input_ids=ids).last_hidden_state
        assert torch.equal(load_base(tiny_bert).model(input_ids=ids).last_hidden_state, expected)
        half = load_base(tiny_bert, dtype="bfloat16").model
        assert half(input_ids=ids).last_hidden_state.dtype == torch.bfloat16


def test_fingerprints_are_of_names_shapes_and_bytes(tiny_bert) -> None:
    weights = load_weights(tiny_bert)
    known = fingerprint_weights(weights)
    assert fingerprint_weights(dict(reversed(weights.items()))) == known
    name = next(iter(weights))
    for change in (weights[name].T, weights[name] + np.float32(1), weights[name].astype("float64")):
        assert fingerprint_weights({**weights, name: change}) != known
    assert fingerprint_weights({**weights, "more": np.zeros(0, np.float32)}) != known


def test_weights_the_folder_lacks_are_the_same_every_time(copy) -> None:
    weights = load_file(copy / "model.safetensors")
    kept = {name: w for name, w in weights.items() if not name.startswith("pooler")}
    assert len(kept) < len(weights)
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    torch.manual_seed(1)
    state = torch.get_rng_state()
    with pytest.warns(match=r"base: pooler\.dense\.bias and 1 others: not among the weights"):
        one = fingerprint_weights(load_weights(copy))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    with pytest.warns(match="random numbers stand in"):
        assert fingerprint_weights(load_weights(copy)) == one


def test_what_cannot_be_loaded_is_named(copy, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty/config\.json: missing"):
        load_weights(tmp_path / "empty")
    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"base/model\.safetensors: damaged"):
        load_weights(copy)


def test_weights_that_would_spoil_every_result_are_refused(copy) -> None:
    weights = load_file(copy / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    for value, text in (
        (torch.full_like(weights[name], float("nan")), rf"base: {name}: NaN or infinity in 1 of"),
        (torch.zeros(3, 3), rf"base: {name}: \[3, 3\] but \[16, 24\] is expected"),
    ):
        save_file({**weights, name: value}, copy / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(InputError, match=text):
            load_weights(copy)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config: "),
        ({"architectures": [["BertModel"]]}, "architectures: "),
        ({"num_attention_heads": 0}, ""),
        ({"hidden_size": "wide"}, "no config of a known model"),
    ],
)
def test_a_config_of_no_loadable_base_is_named(copy, changes, text) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(InputError, match=f"base.*: {text}"):
        load_weights(copy)


def test_code_beside_the_weights_is_never_run(copy) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Evil", "AutoConfig": "evil.EvilConfig"}
    config["model_type"] = "evil"
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "evil.py").write_text("raise SystemExit('code of a stranger ran')")
    with pytest.raises(InputError, match=r"base/config\.json: no config of a known model"):
        load_weights(copy)


def test_pickled_weights_are_refused(copy) -> None:
    weights = load_file(copy / "model.safetensors")
    torch.save(weights, copy / "pytorch_model.bin")
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"base: no model\.safetensors"):
        load_weights(copy)
