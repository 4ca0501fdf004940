"""Bases whose files have other names, or other tensors, than the model has weights."""

import warnings

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from icm_ray.adapters import open_adapter
from icm_ray.errors import InputError
from icm_ray.exporting import export_adapter, export_model

TEXT = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "vocab_size": 32}
MOE = {**TEXT, "intermediate_size": 24, "num_key_value_heads": 1, "head_dim": 8}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]


def llava():
    vision = hf.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    text = hf.LlamaConfig(**TEXT, **IDS, intermediate_size=24)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=30)
    return hf.LlavaForConditionalGeneration(config)


def qwen3_vl_moe():
    text = {
        **MOE, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "patch_size": 4,
        "out_hidden_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = hf.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    return hf.Qwen3VLMoeForConditionalGeneration(config)


MODELS = {
    "llava": (llava, {"target_modules": ["q_proj", "linear_1"]}, "language_model.model.layers.0"),
    "mixtral": (
        lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**MOE, **IDS, num_local_experts=4)),
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
        "model.layers.0.block_sparse_moe.experts.3.w1.weight",
    ),
    "gpt_oss": (
        lambda: hf.GptOssForCausalLM(
            hf.GptOssConfig(**MOE, **IDS, num_local_experts=4, num_experts_per_tok=2)
        ),
        {"target_modules": ["v_proj"], "target_parameters": EXPERTS},
        "model.layers.0.mlp.experts.gate_up_proj",
    ),
    "nomic_bert": (
        lambda: hf.NomicBertModel(hf.NomicBertConfig(**TEXT, intermediate_size=24)),
        {"target_modules": ["k_proj", "v_proj", "down_proj"]},
        "encoder.layers.0.attn.Wqkv.weight",
    ),
    "qwen3_vl_moe": (
        qwen3_vl_moe,
        {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
        "model.language_model.layers.0.mlp.experts.gate_up_proj",
    ),
}


def made(name, folder, **options):
    """Save a base and an adapter of PEFT's; return the class and PEFT's own merge's weights."""
    from peft import LoraConfig, get_peft_model

    build, targets, _ = MODELS[name]
    torch.manual_seed(0)
    model = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder / "base", **options)
        model = type(model).from_pretrained(folder / "base")
        config = LoraConfig(r=2, lora_alpha=3, init_lora_weights=False, **targets)
        wrapped = get_peft_model(model, config)
        wrapped.save_pretrained(str(folder / "adapter"))
        return type(model), wrapped.merge_and_unload().state_dict()


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("name", MODELS)
def test_the_whole_model_is_what_peft_merges(name, shard, tmp_path) -> None:
    kind, expected = made(name, tmp_path, max_shard_size=shard)
    stored = [key for file in (tmp_path / "base").glob("*.safetensors") for key in load_file(file)]
    assert any(key.startswith(MODELS[name][2]) for key in stored), "saved as old releases did"
    export_model(open_adapter(tmp_path / "adapter"), tmp_path / "base", tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = kind.from_pretrained(tmp_path / "out").state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


def test_an_adapter_of_an_old_release_finds_its_weights(tmp_path) -> None:
    kind, expected = made("llava", tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    old = {
        key.replace("model.model.language_model.", "model.language_model.model.").replace(
            "model.model.multi_modal", "model.multi_modal"
        ).replace("model.model.vision_tower", "model.vision_tower"): value
        for key, value in load_file(file).items()
    }  # fmt: skip
    assert not any(".model.model." in key for key in old)
    save_file(old, file)
    export_model(open_adapter(tmp_path / "adapter"), tmp_path / "base", tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = kind.from_pretrained(tmp_path / "out").state_dict()
    key = "model.language_model.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6)


def test_experts_that_files_hold_turned_are_turned_back(tmp_path) -> None:
    """As in the checkpoints that Qwen published."""
    kind, expected = made("qwen3_vl_moe", tmp_path)
    file = tmp_path / "base" / "model.safetensors"
    tensors = {
        key: x.transpose(1, 2).contiguous() if "experts" in key else x
        for key, x in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    export_model(open_adapter(tmp_path / "adapter"), tmp_path / "base", tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = kind.from_pretrained(tmp_path / "out").state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)


def test_weights_that_are_rearranged_when_loaded_are_refused(tmp_path) -> None:
    """A change cannot be added to what such files hold; the reason is named."""
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import Interleave, WeightConverter

    model = hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**TEXT, intermediate_size=24))
    model.save_pretrained(tmp_path / "base")
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["dense"], init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(str(tmp_path / "adapter"))
    mixed = WeightConverter("dense.weight", "dense.weight", operations=[Interleave(dim=0)])
    register_checkpoint_conversion_mapping("GPTNeoXForCausalLM", [mixed], overwrite=True)
    with pytest.raises(InputError, match=r"dense.*loads through Interleave.* beside the base"):
        export_model(open_adapter(tmp_path / "adapter"), tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_adapter_formats_have_no_fused_experts(tmp_path) -> None:
    made("mixtral", tmp_path)
    with pytest.raises(InputError, match=r"an expert inside of one parameter but mlx has factors"):
        export_adapter(open_adapter(tmp_path / "adapter"), "mlx", tmp_path / "out")
