"""What we write, PEFT and we read back as the same change; and the same bytes every time."""

import json

import pytest
import torch
from adapter_samples import CASES, peft_deltas, relative, small_model
from safetensors import safe_open
from safetensors.torch import load_file

from icm_ray.adapters import fingerprint_of, load_adapter, open_adapter, save_adapter
from icm_ray.adapters.peft_reading import load_with_peft
from icm_ray.errors import InputError
from icm_ray.files import read_manifest
from icm_ray.types import LoRAFactors


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


@pytest.mark.parametrize("case", CASES)
def test_round_trip_through_peft(make_peft, tmp_path, case):
    kind, options = CASES[case]
    adapter = open_adapter(make_peft(kind, **options)[0]).load()
    save_adapter(adapter, tmp_path / "out")
    again = load_adapter(tmp_path / "out", adapter.name)
    assert again.fingerprint == adapter.fingerprint
    assert again.layouts == adapter.layouts
    products, _ = peft_deltas(
        load_with_peft(small_model(kind), open_adapter(tmp_path / "out")), None
    )
    assert products.keys() == adapter.modules.keys()
    for module, product in products.items():
        assert relative(product, adapter.modules[module].delta()) <= 1e-6


def test_unequal_ranks_and_names_that_end_alike(adapter_of, tmp_path):
    adapter = adapter_of(
        {"h.0.q": 2, "model.h.0.q": 3, "a.model.h.0.q": 3, "h.0.k": 0, "h-1.v+": 1}
    )
    save_adapter(adapter, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (3, 3, False)
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert config["target_modules"] == ["a.model.h.0.q", "h-1.v+", "h.0.q", "model.h.0.q"]
    again = load_adapter(tmp_path / "out")
    assert {m: f.rank for m, f in again.modules.items()} == {
        m: f.rank for m, f in adapter.modules.items() if f.rank
    }
    assert again.fingerprint == adapter.fingerprint
    assert all(factors.scaling == 1 for factors in again.modules.values())


def test_short_target_names_only_when_they_mean_the_same(adapter_of, tmp_path):
    def targets(adapter):
        save_adapter(adapter, tmp_path / "out")
        return config_of(tmp_path / "out")["target_modules"]

    full = ["layers.0.q", "layers.1.q"]
    assert targets(adapter_of([2, 2])) == ["q"]
    assert targets(adapter_of([2, 2, 0])) == full
    assert targets(adapter_of([2, 2], config={})) == full
    assert targets(adapter_of([2, 2], config={"target_modules": ".*q"})) == full
    assert targets(adapter_of([2, 2], config={"target_modules": ["v"]})) == full
    narrowed = {"target_modules": ["q"], "layers_to_transform": [0, 1]}
    assert targets(adapter_of([2, 2], config=narrowed)) == full
    holes = {"layers.0.q": 2, "layers.1.q": 2, "layers.5.q": 2}
    assert targets(adapter_of(holes)) == sorted(holes)


def test_a_change_of_rank_zero_everywhere_is_still_a_folder(adapter_of, tmp_path):
    save_adapter(adapter_of([0, 0]), tmp_path / "out")
    with pytest.warns(UserWarning, match="all-zero change in 2 of 2 modules"):
        again = load_adapter(tmp_path / "out")
    assert not any(factors.delta().any() for factors in again.modules.values())


def test_same_adapter_same_bytes_and_a_manifest(adapter_of, tmp_path):
    for name in ("one", "two"):
        save_adapter(
            adapter_of([3, 2]), tmp_path / name, info={"key": "k"}, extra_files={"README.md": "Hi."}
        )
    one, two = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("one", "two"))
    assert one == two
    assert set(one) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
    }
    assert read_manifest(tmp_path / "one")["key"] == "k"
    with safe_open(tmp_path / "one" / "adapter_model.safetensors", "pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_element_types(adapter_of, tmp_path):
    save_adapter(adapter_of([2], dtype=torch.bfloat16), tmp_path / "out")
    assert open_adapter(tmp_path / "out").dtype == torch.bfloat16
    save_adapter(adapter_of([2], dtype=torch.bfloat16), tmp_path / "out", dtype=torch.float16)
    assert open_adapter(tmp_path / "out").dtype == torch.float16


def test_values_too_large_for_the_element_type_are_refused(adapter_of, tmp_path):
    modules = {"q": LoRAFactors(torch.full((1, 5), 1e5), torch.full((6, 1), 1e5))}
    adapter = adapter_of([1])
    adapter = type(adapter)("x", None, modules, {}, fingerprint_of(modules), dtype=torch.float16)
    with pytest.raises(InputError, match="Choose output dtype float32"):
        save_adapter(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_the_inputs_share_is_kept(adapter_of, tmp_path):
    config = {"task_type": "CAUSAL_LM", "fan_in_fan_out": True, "revision": "v1", "r": 64}
    save_adapter(adapter_of([2], config=config), tmp_path / "out")
    written = config_of(tmp_path / "out")
    assert written["base_model_name_or_path"] == "base"
    assert {key: written[key] for key in config} == {**config, "r": 2}
    save_adapter(adapter_of([2], config={"revision": "../../etc"}), tmp_path / "out")
    assert config_of(tmp_path / "out")["revision"] is None


def test_saved_modules_stand_beside_the_peft_file(adapter_of, tmp_path):
    head = {"classifier.weight": torch.arange(6).reshape(2, 3).T}
    save_adapter(adapter_of([2], saved_modules=head), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "saved_modules.safetensors")
    torch.testing.assert_close(stored, head)
    assert load_adapter(tmp_path / "out").modules.keys() == {"layers.0.q"}


def test_shared_memory_and_views_can_be_saved(adapter_of, tmp_path):
    a, b = torch.randn(5, 2).T, torch.randn(6, 4)[:, :2]
    modules = {"x.q": LoRAFactors(a, b), "y.q": LoRAFactors(a, b)}
    adapter = type(adapter_of([1]))("n", None, modules, {}, fingerprint_of(modules))
    save_adapter(adapter, tmp_path / "out")
    assert load_adapter(tmp_path / "out").fingerprint == adapter.fingerprint


def test_nothing_foreign_is_written_over(adapter_of, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(InputError, match="this project did not write"):
        save_adapter(adapter_of([2]), tmp_path / "mine")
    with pytest.raises(InputError, match="a file name is expected"):
        save_adapter(adapter_of([2]), tmp_path / "out", extra_files={"../x": ""})
    with pytest.raises(InputError, match="no modules"):
        save_adapter(adapter_of([]), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_weights_survive_half_precision(
    make_adapter, adapter_around, tmp_path, dtype
) -> None:
    plain = make_adapter("a", spread=0.05)
    small = {m: LoRAFactors(f.a, f.b * 2e-6) for m, f in plain.modules.items()}
    save_adapter(adapter_around("a", small), tmp_path / "a", dtype=dtype)
    loaded = load_adapter(tmp_path / "a")
    for module, factors in small.items():
        error = (loaded.modules[module].delta() - factors.delta()).norm() / factors.delta().norm()
        assert error < 2 * torch.finfo(dtype).eps


def test_what_half_precision_holds_is_written_as_it_is(make_adapter, adapter_around, tmp_path):
    plain = make_adapter("a", spread=0.05)
    exact = {
        m: LoRAFactors(f.a.half().float(), f.b.half().float()) for m, f in plain.modules.items()
    }
    save_adapter(adapter_around("a", exact), tmp_path / "a", dtype=torch.float16)
    for module, factors in load_adapter(tmp_path / "a").modules.items():
        assert torch.equal(factors.a, exact[module].a)
        assert torch.equal(factors.b, exact[module].b)


def test_values_too_small_for_the_element_type_are_refused(make_adapter, adapter_around, tmp_path):
    plain = make_adapter("a")
    gone = {m: LoRAFactors(f.a, f.b * 1e-20) for m, f in plain.modules.items()}
    with pytest.raises(InputError, match="values too small for"):
        save_adapter(adapter_around("a", gone), tmp_path / "a", dtype=torch.float16)
    assert not (tmp_path / "a").exists()


def test_ranks_far_apart_meet_in_the_middle(adapter_around, tmp_path):
    a, b = torch.full((1, 5), 1e-30), torch.full((6, 1), 1e30)
    one = adapter_around("a", {"q": LoRAFactors(a, b)}, config={"target_modules": ["q"]})
    save_adapter(one, tmp_path / "a", dtype=torch.float16)
    found = load_adapter(tmp_path / "a").modules["q"].delta()
    torch.testing.assert_close(found, torch.ones(6, 5), rtol=2e-3, atol=0)
