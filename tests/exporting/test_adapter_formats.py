"""Adapters in other tools' formats: read again to the same bits, and by the formats' formulas."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from icm_ray.adapters import open_adapter, save_adapter
from icm_ray.errors import InputError
from icm_ray.exporting import export_adapter
from icm_ray.types import LoRAFactors

PIPELINE = {
    "unet.mid_block.attentions.0.proj_in": (6, 5),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0": (6, 5),
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": (4, 5),
    "text_encoder_2.text_model.encoder.layers.0.mlp.fc1": (4, 3),
}
LLM = {
    "model.embed_tokens": (5, 9),
    "model.layers.0.self_attn.q_proj": (6, 5),
    "model.layers.1.self_attn.q_proj": (6, 5),
}
EMBEDDING = {"layouts": {"model.embed_tokens": "embedding"}}


def written(tmp_path, form, adapter, dtype=torch.float32):
    """Save an adapter as PEFT's, export it, and return what is read from both folders."""
    save_adapter(adapter, tmp_path / "merged", dtype=dtype)
    merged = open_adapter(tmp_path / "merged")
    export_adapter(merged, form, tmp_path / "out")
    return merged, open_adapter(tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("form", "shapes", "fields"),
    [
        ("kohya", PIPELINE, {}),
        ("diffusers", PIPELINE, {}),
        ("mlx", LLM, EMBEDDING),
    ],
)
def test_an_export_is_read_back_to_the_same_bits(
    tmp_path, form, shapes, fields, dtype, make_adapter
):
    adapter = make_adapter(shapes=shapes, rank=3, **fields)
    merged, again = written(tmp_path, form, adapter, dtype)
    assert again.format.lower() == form
    assert again.fingerprint() == merged.fingerprint()
    assert again.dtype == dtype
    assert again.layouts == merged.layouts


def test_ranks_may_differ_from_module_to_module(tmp_path, make_adapter):
    ranks = dict(zip(PIPELINE, (1, 2, 3, 4), strict=True))
    merged, again = written(tmp_path, "kohya", make_adapter(shapes=PIPELINE, rank=ranks))
    assert again.fingerprint() == merged.fingerprint()


def test_the_files_hold_what_the_formats_formulas_ask_for(tmp_path, make_adapter):
    merged, _ = written(tmp_path, "kohya", make_adapter(shapes=PIPELINE, rank=3))
    tensors = load_file(tmp_path / "out" / "merged.safetensors")
    name = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    up, down, alpha = (
        tensors[f"{name}.{x}"] for x in ("lora_up.weight", "lora_down.weight", "alpha")
    )
    delta = merged.factors("text_encoder.text_model.encoder.layers.0.mlp.fc1").delta()
    assert torch.allclose(float(alpha) / len(down) * up @ down, delta, atol=1e-6)
    assert any(key.startswith("lora_te2_") for key in tensors)


def test_mlx_gets_its_own_settings(tmp_path, make_adapter):
    merged, _ = written(tmp_path, "mlx", make_adapter(shapes=LLM, rank=3, **EMBEDDING))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    keys = ["model.embed_tokens", "self_attn.q_proj"]
    assert config["lora_parameters"] == {"rank": 3, "scale": 1.0, "dropout": 0.0, "keys": keys}
    assert (config["fine_tune_type"], config["num_layers"], config["model"]) == ("lora", -1, "base")
    tensors = load_file(tmp_path / "out" / "adapters.safetensors")
    key = "model.layers.0.self_attn.q_proj"
    x = torch.randn(2, 5)
    theirs = x @ tensors[f"{key}.lora_a"] @ tensors[f"{key}.lora_b"]
    assert torch.allclose(theirs, x @ merged.factors(key).delta().T, atol=1e-6)


def test_convolutions_travel_through_kohya_and_diffusers(tmp_path, adapter_around):
    name = "unet.mid_block.resnets.0.conv1"
    conv = adapter_around(
        "c", {name: LoRAFactors(torch.randn(2, 27), torch.randn(4, 2))}, layouts={name: "conv:3x3"}
    )
    for form in ("kohya", "diffusers"):
        merged, again = written(tmp_path / form, form, conv)
        assert again.fingerprint() == merged.fingerprint()
        assert again.layouts == {name: "conv:3x3"}
    with pytest.raises(InputError, match="a convolution but MLX"):
        export_adapter(open_adapter(tmp_path / "kohya" / "merged"), "mlx", tmp_path / "mlx")


@pytest.mark.parametrize(
    ("form", "shapes", "text"),
    [
        ("kohya", {"model.layers.0.q": (6, 5)}, "no name of kohya's"),
        ("kohya", {"unet.a.b": (6, 5), "unet.a_b": (6, 5)}, "the same name as another module"),
        ("diffusers", {"model.layers.0.q": (6, 5)}, "no component of a pipeline"),
        ("mlx", {"model.embed_tokens": (6, 5)}, "another kind of layer"),
    ],
)
def test_what_a_format_cannot_say_is_refused(tmp_path, form, shapes, text, make_adapter):
    with pytest.raises(InputError, match=text):
        written(tmp_path, form, make_adapter(shapes=shapes))
    assert not (tmp_path / "out").exists()


def scaled_folder(path: Path, alphas, make_adapter):
    """Write a PEFT folder by hand whose modules have different scalings."""
    save_adapter(make_adapter(shapes=dict.fromkeys(alphas, (6, 5))), path)
    config = json.loads((path / "adapter_config.json").read_text())
    config["alpha_pattern"] = alphas
    (path / "adapter_config.json").write_text(json.dumps(config))
    return open_adapter(path)


def test_scalings_go_along_where_the_format_has_a_place_for_them(tmp_path, make_adapter):
    names = ("unet.mid_block.attentions.0.proj_in", "unet.mid_block.attentions.0.proj_out")
    alphas = dict(zip(names, (1.0, 6.0), strict=True))
    adapter = scaled_folder(tmp_path / "a", alphas, make_adapter)
    export_adapter(adapter, "kohya", tmp_path / "kohya")
    assert open_adapter(tmp_path / "kohya").fingerprint() == adapter.fingerprint()
    for form, text in (("mlx", "has one for all"), ("diffusers", "files have none")):
        with pytest.raises(InputError, match=text):
            export_adapter(adapter, form, tmp_path / form)


def test_an_export_over_its_own_adapter_is_refused(tmp_path, make_adapter):
    save_adapter(make_adapter(shapes=LLM, **EMBEDDING), tmp_path / "merged")
    with pytest.raises(InputError, match="the adapter"):
        export_adapter(open_adapter(tmp_path / "merged"), "mlx", tmp_path / "merged")
