"""kohya and diffusers files against diffusers itself: its converters, its loader, PEFT's deltas."""

import warnings

import pytest
import torch
from adapter_samples import peft_deltas, relative
from safetensors.torch import save_file

from icm_ray.adapters import load_adapter

diffusers = pytest.importorskip("diffusers", reason="in the extra dev")


@pytest.fixture
def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def layers_of(unet):
    """Return the layers that kohya trains: those of the transformers, and convolutions."""
    return {
        name: layer
        for name, layer in unet.named_modules()
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
        and (".attentions." in name or ".resnets." in name or "samplers" in name)
    }


def factors_of(layer, rank, generator):
    a_shape = (rank, *layer.weight.shape[1:])
    b_shape = (layer.weight.shape[0], rank, *(1 for _ in layer.weight.shape[2:]))
    return tuple(torch.randn(shape, generator=generator) * 0.2 for shape in (a_shape, b_shape))


def deltas_in_diffusers(unet, tensors, alphas=None):
    """Load a LoRA as a pipeline does, and return PEFT's deltas under the pipeline's names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's, of modules that the tensors name and r does not
        unet.load_lora_adapter(
            dict(tensors), network_alphas=alphas, prefix="unet", adapter_name="default"
        )
    products, weights = peft_deltas(unet, None)
    assert all(relative(weights[name], products[name]) < 1e-6 for name in products)
    return {f"unet.{name}": delta for name, delta in products.items()}


def assert_the_same(adapter, expected):
    assert set(adapter.modules) == set(expected)
    for module, delta in expected.items():
        assert relative(adapter.modules[module].delta(), delta) < 1e-6, module


def test_a_kohya_file_means_what_diffusers_makes_of_it(unet, tmp_path):
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers

    generator = torch.Generator().manual_seed(1)
    kohya = {}
    for number, (name, layer) in enumerate(layers_of(unet).items()):
        mangled = "lora_unet_" + name.replace(".", "_")
        a, b = factors_of(layer, 2 + number % 3, generator)
        kohya |= {f"{mangled}.lora_down.weight": a, f"{mangled}.lora_up.weight": b}
        # One alpha for all: where they differ, diffusers gives attention layers the commonest.
        kohya[f"{mangled}.alpha"] = torch.tensor(1.5)
    save_file(kohya, tmp_path / "style.safetensors")
    expected = deltas_in_diffusers(unet, *_convert_non_diffusers_lora_to_diffusers(dict(kohya)))
    assert_the_same(load_adapter(tmp_path / "style.safetensors"), expected)


@pytest.mark.parametrize("spelling", ["peft", "lora.down"])
def test_a_diffusers_file_means_what_diffusers_makes_of_it(unet, tmp_path, spelling):
    generator = torch.Generator().manual_seed(2)
    sides = ("lora_A", "lora_B") if spelling == "peft" else ("lora.down", "lora.up")
    tensors = {}
    for number, (name, layer) in enumerate(layers_of(unet).items()):
        for side, values in zip(sides, factors_of(layer, 2 + number % 2, generator), strict=True):
            tensors[f"unet.{name}.{side}.weight"] = values
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    assert_the_same(load_adapter(tmp_path), deltas_in_diffusers(unet, tensors))


def test_a_pipeline_saved_with_its_configs_keeps_their_scaling(unet, tmp_path):
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    unet.add_adapter(
        LoraConfig(
            r=4,
            lora_alpha=6,
            use_rslora=True,
            target_modules=["to_q", "to_out.0"],
            alpha_pattern={"to_out.0": 3},
        )
    )
    torch.manual_seed(3)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=get_peft_model_state_dict(unet),
        **_collate_lora_metadata({"unet": unet}),
    )
    expected = {f"unet.{name}": delta for name, delta in peft_deltas(unet, None)[0].items()}
    assert_the_same(load_adapter(tmp_path), expected)


def test_old_attention_processors_of_a_text_encoder_are_read_by_their_layers(tmp_path):
    from diffusers.utils.state_dict_utils import convert_state_dict_to_peft

    generator = torch.Generator().manual_seed(4)
    path = "text_encoder.text_model.encoder.layers.0.self_attn"
    tensors = {
        f"{path}.to_{leaf}_lora.{side}.weight": torch.randn(4, 4, generator=generator)
        for leaf in ("q", "k", "v", "out")
        for side in ("down", "up")
    }
    save_file(tensors, tmp_path / "pytorch_lora_weights.safetensors")
    theirs = convert_state_dict_to_peft(dict(tensors))
    expected = {
        key.removesuffix(".lora_A.weight"): theirs[key.replace("lora_A", "lora_B")] @ theirs[key]
        for key in theirs
        if key.endswith(".lora_A.weight")
    }
    assert len(expected) == 4
    assert_the_same(load_adapter(tmp_path), expected)
