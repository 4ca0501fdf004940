"""What Python is told of adapters that are none; every way of being none is in tests/corpus."""

import pytest
import torch
from adapter_samples import PREFIX, plain_config

from icm_ray.adapters import load_adapter, open_adapter
from icm_ray.errors import InputError

A0, B0 = (f"{PREFIX}layers.0.q.lora_{side}.weight" for side in "AB")


def test_paths_that_are_no_folders(make_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = make_folder() / "adapter_config.json"
    for path, text in (
        ("meta-llama/adapter", "nor in the Hugging Face cache"),
        (file, "a single file but its folder is expected"),
        ("a\0b", "folder"),
        ("x" * 5000, "folder"),
    ):
        with pytest.raises(InputError, match=text):
            open_adapter(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError) as error:
        open_adapter("empty")
    assert len(error.value.problems) == 2


def test_all_problems_are_told_at_once(make_folder):
    folder = make_folder(
        {"r": 0, "use_dora": True, "bias": "all"},
        {A0: torch.ones(2), f"{PREFIX}layers.1.q.lora_B.weight": ...},
    )
    with pytest.raises(InputError) as error:
        load_adapter(folder)
    assert len(error.value.problems) == 5


def test_every_bad_tensor_is_named(make_folder):
    bad = {A0: torch.full((2, 5), float("nan")), B0: torch.full((6, 2), float("inf"))}
    with pytest.raises(InputError) as error:
        load_adapter(make_folder(tensors=bad))
    assert len(error.value.problems) == 2


def test_grouped_convolutions_are_told_apart(make_peft):
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=2))
    import warnings

    from peft import LoraConfig, get_peft_model

    folder, _ = make_peft("conv", r=2, target_modules=["1"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
        wrapped.save_pretrained(str(folder))
    with pytest.raises(InputError, match="Grouped convolutions"):
        open_adapter(folder)


@pytest.mark.timeout(30)
def test_too_many_patterns_are_refused_in_time(make_folder):
    patterns = {f".*layers.*{i}.*q": 2 for i in range(2000)}
    tensors = {
        f"{PREFIX}{'deep.' * 20}layers.{i}.q.lora_{side}.weight": torch.ones(
            (2, 5) if side == "A" else (6, 2)
        )
        for i in range(100)
        for side in "AB"
    }
    with pytest.raises(InputError, match="2000 regular expressions, of which 1000"):
        open_adapter(make_folder({"rank_pattern": patterns}, tensors))


def test_the_plain_config_itself_is_accepted(make_folder):
    assert open_adapter(make_folder()).config == plain_config()
