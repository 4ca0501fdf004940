"""What a merge leaves behind: proven, complete, and never a change that is none."""

import json
import shutil

import pytest
import torch
from command_samples import SHAPES, save_lora
from safetensors.torch import load_file, save_file

from icm_ray.adapters import load_adapter, open_all
from icm_ray.errors import InputError
from icm_ray.files import sha256_of_file
from icm_ray.merging.folder import Origin, read_merged, write_merged
from icm_ray.merging.merge import merge
from icm_ray.merging.proof import reproduce, verify_folder

FILES = {
    "adapter_config.json",
    "adapter_model.safetensors",
    "README.md",
    "merge_report.json",
    "manifest.json",
    "run.json",
}


@pytest.fixture
def write(tmp_path):
    """Return a function that merges folders by name and writes the result."""

    def written(
        folders, method="soup", target=None, policy="refuse", params=None, evicted=None, **options
    ):
        files = open_all(list(folders.items()), policy)
        result = merge([file.load() for file in files], method, params=params)
        target = target or tmp_path / "merged"
        origin = Origin(files, "k", 1.5, modules_to_save=policy, evicted=evicted or {})
        checks = write_merged(result, target, origin, **options)
        return target, result, checks

    return written


@pytest.fixture
def two(tmp_path):
    return {"a": save_lora(tmp_path / "a", 1), "b": save_lora(tmp_path / "b", 2, rank=3)}


def test_the_folder_is_complete_and_readable_by_others(write, two, tmp_path):
    target, result, checks = write(two)
    assert {path.name for path in target.iterdir()} == FILES
    manifest = json.loads((target / "manifest.json").read_text())
    assert set(manifest["files"]) == FILES - {"manifest.json", "run.json"}
    assert manifest["key"] == "k"
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in target.iterdir())
    assert checks["max_relative_error"] < 1e-5
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    stored = load_adapter(target)
    assert stored.fingerprint == read_merged(target).fingerprint
    for module, factors in result.adapter.modules.items():
        torch.testing.assert_close(stored.modules[module].delta(), factors.delta())


def test_config_is_plain(write, two):
    target, _, _ = write(two)
    config = json.loads((target / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (5, 5, False)


def test_the_order_of_names_in_the_inputs_configs_says_nothing(write, two, tmp_path):
    """PEFT keeps target_modules as a set and writes it in any order."""
    first, _, _ = write(two)
    save_lora(two["b"], 2, rank=3, target_modules=["value", "query"])
    second, _, _ = write(two, target=tmp_path / "again")
    config = (first / "adapter_config.json").read_text()
    assert (second / "adapter_config.json").read_text() == config
    assert json.loads(config)["target_modules"] == ["query", "value"]


def test_clocks_and_paths_are_in_run_json_alone(write, two, tmp_path):
    target, _, _ = write(two)
    run = json.loads((target / "run.json").read_text())
    assert run["seconds"] == 1.5
    assert run["inputs"] == {"a": str(two["a"]), "b": str(two["b"])}
    for path in target.iterdir():
        if path.name != "run.json":
            assert str(tmp_path).encode() not in path.read_bytes()


def test_a_second_write_gives_the_same_bytes(write, two, tmp_path):
    first, _, _ = write(two)
    second, _, _ = write(dict(reversed(two.items())), target=tmp_path / "again")
    for name in FILES - {"run.json"}:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_a_merge_of_zero_adapters_is_an_error(write, tmp_path):
    zero = {name: save_lora(tmp_path / name, i, size=0.0) for i, name in enumerate("ab")}
    with pytest.raises(InputError, match="changes nothing \\(every input is zero\\)"):
        write(zero)
    assert not (tmp_path / "merged").exists()


def test_adapters_that_cancel_out_are_an_error(write, tmp_path):
    twins = {"a": save_lora(tmp_path / "a", 1), "b": save_lora(tmp_path / "b", 1, size=-1.0)}
    for method in ("soup", "svd", "cat"):
        with pytest.raises(InputError, match="the inputs cancel out"):
            write(twins, method)
    assert not (tmp_path / "merged").exists()


def test_one_zero_adapter_among_others_is_merged(write, two, tmp_path):
    target, _, _ = write({**two, "zero": save_lora(tmp_path / "zero", size=0.0)})
    verify_folder(target)


def test_a_scale_of_zero_is_an_error(write, two):
    with pytest.raises(InputError, match="changes nothing"):
        write(two, "task_arithmetic", params={"scale": 0.0})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_element_type_is_verified_and_reproduced(write, two, dtype):
    target, _, _ = write(two, dtype=dtype)
    tensors = load_file(target / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert read_merged(target).report["dtype"] == str(dtype).removeprefix("torch.")
    assert verify_folder(target)["modules"] == len(SHAPES)
    assert "adapter_model.safetensors" in reproduce(target)


def test_half_precision_inputs_stay_half(write, tmp_path):
    half = {n: save_lora(tmp_path / n, i, dtype=torch.float16) for i, n in enumerate("ab")}
    target, _, _ = write(half, "svd")
    tensors = load_file(target / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    verify_folder(target)


def test_values_too_large_for_the_element_type_are_an_error(write, tmp_path):
    large = {n: save_lora(tmp_path / n, i, size=1e12) for i, n in enumerate("ab")}
    with pytest.raises(InputError, match="float16 cannot hold"):
        write(large, dtype=torch.float16)
    assert not (tmp_path / "merged").exists()


def test_a_folder_of_somebody_else_is_left_alone(write, two, tmp_path):
    theirs = tmp_path / "merged"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError, match="did not write"):
        write(two)
    assert [p.name for p in theirs.iterdir()] == ["thesis.txt"]
    assert (theirs / "thesis.txt").read_text() == "years of work"


def test_an_earlier_merge_is_replaced_whole(write, two, tmp_path):
    save = {"classifier.weight": torch.ones(2, 16)}
    kept = {"a": save_lora(tmp_path / "c", 3, saved=save), "b": two["b"]}
    target, _, _ = write(kept, policy="keep")
    assert (target / "saved_modules").is_dir()
    write(two, target=target)
    assert {path.name for path in target.iterdir()} == FILES


@pytest.fixture
def with_layers(tmp_path):
    layers = [
        {"classifier.weight": torch.full((2, 16), 1.0), "classifier.bias": torch.zeros(2)},
        {"classifier.weight": torch.full((5, 16), 2.0, dtype=torch.float16)},
    ]
    found = {n: save_lora(tmp_path / n, i, saved=layers[i]) for i, n in enumerate("ab")}
    return {**found, "plain": save_lora(tmp_path / "plain", 7)}, layers


def test_saved_modules_are_refused_unless_the_recipe_says_otherwise(write, with_layers):
    with pytest.raises(InputError, match="modules_to_save") as caught:
        write(with_layers[0])
    told = "\n".join(caught.value.problems)
    assert str(with_layers[0]["a"]) in told
    assert str(with_layers[0]["b"]) in told


def test_saved_modules_are_dropped_and_that_is_said(write, with_layers):
    target, _, _ = write(with_layers[0], policy="drop")
    assert {path.name for path in target.iterdir()} == FILES
    report = read_merged(target).report
    assert (report["modules_to_save"], report["saved_modules"]) == ("drop", {})
    reproduce(target)


def test_saved_modules_are_kept_for_each_task(write, with_layers):
    refs, layers = with_layers
    target, _, _ = write(refs, policy="keep")
    for name, expected in zip("ab", layers, strict=True):
        found = load_file(target / "saved_modules" / f"{name}.safetensors")
        assert found.keys() == expected.keys()
        for key, tensor in expected.items():
            assert found[key].dtype == tensor.dtype
            assert torch.equal(found[key], tensor)
    assert not (target / "saved_modules" / "plain.safetensors").exists()
    report = read_merged(target).report
    assert report["saved_modules"] == {
        "a": ["classifier.bias", "classifier.weight"],
        "b": ["classifier.weight"],
    }
    assert "saved_modules/a.safetensors" in (target / "README.md").read_text()
    assert (
        "saved_modules/a.safetensors" in json.loads((target / "manifest.json").read_text())["files"]
    )


def test_what_is_kept_is_verified_and_reproduced(write, with_layers):
    target, _, _ = write(with_layers[0], policy="keep")
    verify_folder(target)
    assert "saved_modules/b.safetensors" in reproduce(target)
    path = target / "saved_modules" / "b.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(InputError, match=r"b\.safetensors: sha256 differs"):
        verify_folder(target)


def reseal(folder):
    """Make the manifest fit what is there: what a careless edit by hand would not do."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {n: sha256_of_file(folder / n) for n in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("name", sorted(FILES - {"run.json", "manifest.json"}))
def test_verify_finds_a_flipped_bit_in_any_file(write, two, name):
    target, _, _ = write(two)
    data = bytearray((target / name).read_bytes())
    data[len(data) // 2] ^= 1
    (target / name).write_bytes(data)
    with pytest.raises(InputError, match=f"{name}: sha256 differs"):
        verify_folder(target)


def test_verify_finds_a_missing_file(write, two):
    target, _, _ = write(two)
    (target / "README.md").unlink()
    with pytest.raises(InputError, match=r"README\.md: listed in manifest\.json but missing"):
        verify_folder(target)


def test_verify_finds_weights_of_another_merge(write, two, tmp_path):
    target, _, _ = write(two)
    other, _, _ = write(two, "task_arithmetic", target=tmp_path / "other")
    shutil.copy(other / "adapter_model.safetensors", target)
    reseal(target)
    with pytest.raises(InputError) as caught:
        verify_folder(target)
    norms = [line for line in caught.value.problems if "norm" in line]
    assert len(norms) == len(SHAPES)
    assert "fingerprint differs" in caught.value.problems[-1]


def test_verify_refuses_a_folder_without_a_manifest(two):
    with pytest.raises(InputError, match=r"manifest\.json: no such file"):
        verify_folder(two["a"])


def test_verify_runs_the_base(write, two, tiny_bert):
    target, _, _ = write(two, base=tiny_bert)
    assert read_merged(target).run["checks"]["change_from_base"] > 0
    assert verify_folder(target, tiny_bert)["relative_error"] < 1e-4


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("soup", {}),
        ("task_arithmetic", {"scale": 0.3, "weights": {"a": 1.0, "b": 0.5}}),
        ("svd", {}),
        ("linear", {"preset": "nsc"}),
        ("negate_add", {"target": "a", "a": "b", "b": "a"}),
    ],
)
def test_reproduce_gives_the_same_bytes(write, two, method, params):
    target, _, _ = write(two, method, params=params)
    assert set(reproduce(target)) == FILES - {"run.json"}


def test_what_was_left_out_is_on_the_card_and_stays_there(write, two):
    target, _, _ = write(two, evicted={"law": "its workers died 4 times (x)"})
    assert "\n- law: its workers died 4 times (x)\n" in (target / "README.md").read_text()
    assert set(reproduce(target)) == FILES - {"run.json"}


def test_reproduce_finds_a_changed_input(write, two):
    target, _, _ = write(two)
    weights = two["b"] / "adapter_model.safetensors"
    tensors = {name: tensor * 1.01 for name, tensor in load_file(weights).items()}
    save_file(tensors, weights)
    with pytest.raises(InputError, match="is not the adapter") as caught:
        reproduce(target)
    assert caught.value.problems[0].startswith(str(two["b"]))


def test_reproduce_names_an_input_that_is_gone(write, two):
    target, _, _ = write(two)
    shutil.rmtree(two["a"])
    with pytest.raises(InputError, match="no such folder"):
        reproduce(target)


def test_reproduce_without_run_json_says_that_nobody_knows_the_inputs(write, two):
    target, _, _ = write(two)
    (target / "run.json").unlink()
    with pytest.raises(InputError, match=r"run\.json: missing"):
        reproduce(target)
