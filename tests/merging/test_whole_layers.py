"""What becomes of full layers: averaged only where they are equal in shape, matched as in PEFT."""

import json
import shutil

import pytest
import torch
from command_samples import save_lora
from safetensors.torch import load_file, save_file

from icm_ray.adapters import open_all
from icm_ray.adapters.contents import is_saved
from icm_ray.errors import InputError
from icm_ray.merging.folder import Origin, read_merged, write_merged
from icm_ray.merging.merge import merge
from icm_ray.merging.proof import reproduce, verify_folder
from icm_ray.merging.whole_layers import check_mean, shapes_of


@pytest.mark.parametrize(
    ("path", "is_selected"),
    [
        ("classifier.weight", True),
        ("pre_classifier.bias", True),
        ("classifier.out_proj.weight", True),
        ("bert.classifier.dense.weight", True),
        ("classifiers.weight", False),
        ("score.weight", False),
    ],
)
def test_modules_are_matched_by_their_ending(path, is_selected):
    assert is_saved(path, ["classifier"]) == is_selected


@pytest.fixture
def opened(tmp_path):
    """Return a function that opens an adapter for each table of full layers."""

    def files(*layers, policy="mean"):
        refs = [
            (f"t{i}", save_lora(tmp_path / f"t{i}", i, saved=own)) for i, own in enumerate(layers)
        ]
        return open_all(refs, policy)

    return files


def test_the_mean_is_in_the_file_as_peft_has_it(opened, tmp_path):
    heads = [
        {"classifier.weight": torch.full((2, 16), value), "pre_classifier.bias": torch.eye(2)[i]}
        for i, value in enumerate((1.0, 4.0))
    ]
    files = opened(*heads)
    result = merge([file.load() for file in files], "soup")
    write_merged(result, tmp_path / "out", Origin(files, "k", modules_to_save="mean"))
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(tensors["base_model.model.classifier.weight"], torch.full((2, 16), 2.5))
    assert torch.equal(tensors["base_model.model.pre_classifier.bias"], torch.full((2,), 0.5))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier", "pre_classifier"]
    assert read_merged(tmp_path / "out").report["modules_to_save"] == "mean"
    verify_folder(tmp_path / "out")
    assert "adapter_model.safetensors" in reproduce(tmp_path / "out")


def test_whole_layers_in_shards_are_read_where_they_lie(tmp_path):
    head = {"classifier.weight": torch.ones(2, 16)}
    whole = save_lora(tmp_path / "whole", saved=head)
    shards = tmp_path / "shards"
    shards.mkdir()
    tensors = load_file(whole / "adapter_model.safetensors")
    places = {
        name: f"adapter_model-0000{1 + ('lora' in name)}-of-00002.safetensors" for name in tensors
    }
    for place in set(places.values()):
        save_file({n: t for n, t in tensors.items() if places[n] == place}, shards / place)
    index = {"metadata": {}, "weight_map": places}
    (shards / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copyfile(whole / "adapter_config.json", shards / "adapter_config.json")
    one, other = open_all([("whole", whole), ("shards", shards)], "mean")
    assert shapes_of(one) == shapes_of(other) == {"classifier.weight": (2, 16)}
    check_mean([one, other])


def test_unequal_layers_have_no_mean(opened):
    head = {"classifier.weight": torch.ones(2, 16)}
    with pytest.raises(InputError) as error:
        check_mean(opened(head, {"classifier.weight": torch.ones(3, 16)}, None))
    text = str(error.value)
    assert "t1: classifier.weight: 3 x 16 but 2 x 16 as in t0 is expected" in text
    assert "t2: classifier.weight: no such layer but 2 x 16" in text
    assert "Set it to keep or drop" in text
    check_mean(opened(head, head))
    check_mean(opened(None, None))


def test_resized_embeddings_are_told_with_the_recipes_key(tmp_path):
    layers = {f"{name}.weight": torch.ones(40, 16) for name in ("embed_tokens", "lm_head")}
    folder = save_lora(tmp_path / "a", saved=layers, modules_to_save=None)
    with pytest.raises(InputError, match="modules_to_save: mean, keep or drop") as error:
        open_all([("a", folder)])
    assert len(error.value.problems) <= 2
    assert open_all([("a", folder)], "keep")[0].saved_names == tuple(layers)
