"""The base: loaded strictly, rebuilt without a copy, the same every time."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from icm_ray.base_model.loading import build_base, fingerprint_weights, load_base, load_weights
from icm_ray.base_model.placing import Place
from icm_ray.errors import InputError

WEIGHTS = "model.safetensors"


@pytest.fixture
def copy(tiny_bert, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_bert, tmp_path / "base"))


def save(folder: Path, dtype: torch.dtype) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_base_is_mapped_in_the_precision_it_is_stored_in(copy, dtype) -> None:
    save(copy, dtype)
    weights, again = load_weights(copy), load_weights(copy, is_known=True)
    base = build_base(copy, weights, Place(device="cpu"))
    for name, tensor in base.model.state_dict().items():
        assert tensor.dtype == dtype, name
        assert tensor.data_ptr() == weights[name].data_ptr(), name
        assert torch.equal(tensor, again[name]), name
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(copy / WEIGHTS) in maps.read_text(), "read instead of mapped"
    assert base.d_model == 16
    assert not base.model.training
    assert not any(p.requires_grad for p in base.model.parameters())


def test_mixed_precisions_become_the_one_of_most_numbers(copy) -> None:
    save(copy, torch.bfloat16)
    stored = load_file(copy / WEIGHTS)
    name = "embeddings.LayerNorm.weight"
    save_file({**stored, name: stored[name].float()}, copy / WEIGHTS, metadata={"format": "pt"})
    assert {tensor.dtype for tensor in load_weights(copy).values()} == {torch.bfloat16}


def test_other_names_of_the_files_are_converted(copy) -> None:
    plain = load_weights(copy)
    stored = {f"bert.{name}": tensor for name, tensor in load_file(copy / WEIGHTS).items()}
    save_file(stored, copy / WEIGHTS, metadata={"format": "pt"})
    assert fingerprint_weights(load_weights(copy)) == fingerprint_weights(plain)


def test_a_rebuilt_base_computes_the_same(tiny_bert) -> None:
    from transformers import AutoModel

    ids = torch.tensor([[2, 5, 6, 3]])
    plain = AutoModel.from_pretrained(tiny_bert).eval()
    with torch.no_grad():
        expected = plain(input_ids=ids).last_hidden_state
        assert torch.equal(load_base(tiny_bert).model(input_ids=ids).last_hidden_state, expected)
        half = load_base(tiny_bert, Place(dtype="bfloat16")).model
        assert half(input_ids=ids).last_hidden_state.dtype == torch.bfloat16


def test_fingerprints_are_of_names_shapes_and_bytes(tiny_bert) -> None:
    weights = load_weights(tiny_bert)
    known = fingerprint_weights(weights)
    assert fingerprint_weights(dict(reversed(weights.items()))) == known
    name = next(iter(weights))
    for change in (weights[name].T, weights[name] + 1, weights[name].double()):
        assert fingerprint_weights({**weights, name: change}) != known
    assert fingerprint_weights({**weights, "more": torch.zeros(0)}) != known


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
        ({"quantization_config": {"quant_method": "zip"}}, "quantization_config: "),
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
