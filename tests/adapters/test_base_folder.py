"""A base's folder: every damage is named with its file, and no value is read to find it."""

import json
import shutil
import struct
from pathlib import Path

import pytest
from adapter_samples import raw_safetensors
from safetensors.torch import load_file, save_file

from icm_ray.adapters.base_folder import MAX_CONFIG_BYTES, open_base, require_weights
from icm_ray.errors import InputError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def base(tiny_llama, tmp_path):
    return Path(shutil.copytree(tiny_llama, tmp_path / "base"))


@pytest.fixture
def sharded(base):
    """The same base in two files and an index."""
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(tensors)
    places = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(places.values()):
        held = {name: tensors[name] for name in names if places[name] == shard}
        save_file(held, base / shard, metadata={"format": "pt"})
    (base / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return base


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def problems_of(base):
    with pytest.raises(InputError) as error:
        open_base(base)
    return error.value.problems


def test_a_whole_base_is_described_without_loading_it(base, sharded):
    folder = open_base(base)
    assert folder.config.model_type == "llama"
    assert folder.tensors["model.norm.weight"][1].shape == (16,)
    assert {file.name for file, _ in folder.tensors.values()} == {
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    require_weights(folder)


WEIGHTS = {
    "empty": (b"", "in its 0 bytes but a safetensors file"),
    "web page": (b"<!DOCTYPE html><html>not found</html>", "a web page but"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer but"),
    "header without end": (struct.pack("<Q", 2**63) + b"{}", "no header of at most"),
}


@pytest.mark.parametrize("case", WEIGHTS)
@pytest.mark.parametrize("shard", [False, True])
def test_weights_that_are_none_are_named(request, case, shard):
    base = request.getfixturevalue("sharded" if shard else "base")
    content, text = WEIGHTS[case]
    file = base / ("model-00002-of-00002.safetensors" if shard else "model.safetensors")
    file.write_bytes(content)
    (problem,) = problems_of(base)
    assert problem.startswith(f"{file}: ")
    assert text in problem


def test_weights_that_are_cut_are_named(base):
    file = base / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert problems_of(base)[0].startswith(f"{file}: damaged (")


def test_weights_that_are_holes_are_refused_by_their_size(base):
    """12.8 GB by its header and its size, 4 kB on disk."""
    file = base / "model.safetensors"
    size = 4 * 800_000_000 * 4
    entry = {"dtype": "F32", "shape": [4, 800_000_000], "data_offsets": [0, size]}
    raw_safetensors(file, json.dumps({"model.norm.weight": entry}).encode())
    with file.open("r+b") as handle:
        handle.truncate(file.stat().st_size + size)
    (problem,) = problems_of(base)
    assert problem.startswith(f"{file}: ")
    assert "bytes on disk but 12800000" in problem


CONFIGS = {
    "none": (b"", "line 1: not JSON"),
    "deep": (b'{"a":' * 100_000, "nested too deeply"),
    "a list": (b"[]", "a list but a JSON object"),
    "large": (b" " * (MAX_CONFIG_BYTES + 1), "bytes but at most"),
    "twice": (b'{"model_type": "llama", "model_type": "bert"}', "given twice"),
    "unknown": (b'{"model_type": "nothing"}', "no config of a known model (ValueError"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_are_none_are_named(base, case):
    content, text = CONFIGS[case]
    (base / "config.json").write_bytes(content)
    (problem,) = problems_of(base)
    assert problem.startswith(f"{base / 'config.json'}: ")
    assert text in problem


KEYS = {
    "architectures": [["x"]],
    "num_hidden_layers": 1_000_000,
    "n_layer": 10**30,
    "num_labels": 10**9,
    "num_local_experts": 10**7,
    "transformers_weights": "../other.safetensors",
    "attn_implementation": "somebody/kernel",
    "hidden_size": "sixteen",
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("key", KEYS)
def test_config_keys_that_cannot_be_are_named(base, key):
    edit(base / "config.json", **{key: KEYS[key]})
    (problem,) = problems_of(base)
    assert problem.startswith(f"{base / 'config.json'}: ")
    assert key in problem


def test_counts_are_checked_in_inner_tables_and_lists(base):
    edit(
        base / "config.json", vision_config={"depths": [2, 2, 10**6]}, deeper=[[{"n_layers": 1e9}]]
    )
    (problem,) = problems_of(base)
    assert "depths: 1000000 but at most 100000 are expected" in problem


def test_an_infinite_bound_is_no_damage(base):
    """As in the configs of Mamba-2."""
    file = base / "config.json"
    edit(file, time_step_limit=[0.0, float("inf")])
    assert "Infinity" in file.read_text()
    open_base(base)


@pytest.mark.parametrize(
    "place", ["../../secret.safetensors", "/etc/x.safetensors", "model.bin", "", 3, None]
)
def test_an_index_never_leaves_its_folder(sharded, place):
    edit(sharded / INDEX, weight_map={"model.norm.weight": place})
    (problem,) = problems_of(sharded)
    assert problem.startswith(f"{sharded / INDEX}: weight_map: ")


@pytest.mark.parametrize("index", [b"", b"[]", b"{}", b'{"weight_map": []}', b"[" * 100_000])
def test_an_index_that_is_none_is_named(sharded, index):
    (sharded / INDEX).write_bytes(index)
    (problem,) = problems_of(sharded)
    assert problem.startswith(f"{sharded / INDEX}: ")


def test_a_shard_or_tensor_that_the_index_promises_is_missed(sharded):
    edit(
        sharded / INDEX,
        weight_map={"absent": "model-00001-of-00002.safetensors", "b": "other.safetensors"},
    )
    assert problems_of(sharded) == (
        f"{sharded / 'other.safetensors'}: missing but a file is expected. Check the folder.",
    )
    edit(sharded / INDEX, weight_map={"absent": "model-00001-of-00002.safetensors"})
    (problem,) = problems_of(sharded)
    assert "absent: missing but model.safetensors.index.json names it" in problem


def test_all_damages_are_told_at_once(base):
    edit(base / "config.json", architectures="LlamaForCausalLM", num_labels=10**9)
    (base / "model.safetensors").write_bytes(b"")
    assert len(problems_of(base)) == 3


def test_an_adapter_beside_a_base_would_be_added_to_it(base):
    (base / "adapter_config.json").write_text("{}")
    assert "adapter_config.json lies beside it" in problems_of(base)[0]


def test_unknown_weights_and_none_at_all_may_be_looked_at_but_not_loaded(base):
    edit(base / "config.json", quantization_config={"quant_method": "zip"})
    folder = open_base(base)
    with pytest.raises(InputError, match=r"config\.json: quantization_config: \"zip\""):
        require_weights(folder)
    edit(base / "config.json", quantization_config=None)
    (base / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        require_weights(open_base(base))
