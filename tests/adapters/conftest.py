"""Adapter folders to read: made by PEFT on small random models, or written by hand."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from icm_ray.types import Adapter, LoRAFactors

PREFIX = "base_model.model."


def small_model(kind):
    """Return a random transformers model with two layers, or a small convolutional one."""
    import transformers as hf

    torch.manual_seed(0)
    text = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    if kind == "bert":
        config = hf.BertConfig(**text, intermediate_size=48, vocab_size=64)
        return hf.BertModel(config).eval()
    if kind == "gpt2":
        return hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64)
        ).eval()
    if kind == "llama":
        config = hf.LlamaConfig(**text, intermediate_size=48, vocab_size=64, num_key_value_heads=2)
        return hf.LlamaForCausalLM(config).eval()
    if kind == "vit":
        config = hf.ViTConfig(**text, intermediate_size=48, image_size=16, patch_size=4)
        return hf.ViTModel(config).eval()
    return torch.nn.Sequential(
        torch.nn.Conv1d(4, 6, 3), torch.nn.Conv2d(3, 5, (3, 2)), torch.nn.Conv2d(3, 5, 1)
    )


@pytest.fixture
def make_peft(tmp_path):
    """Return a function that saves a random PEFT adapter and returns `(folder, model)`."""

    def make(kind, *, dtype=torch.float32, seed=0, folder="adapter", **options):
        from peft import LoraConfig, get_peft_model

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(small_model(kind), LoraConfig(**options))
            torch.manual_seed(seed)
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(parameter, std=0.2)
            model.to(dtype).save_pretrained(str(tmp_path / folder))
        return tmp_path / folder, model

    return make


@pytest.fixture
def make_folder(tmp_path):
    """Return a function that writes a folder by hand: (config changes, tensor changes) -> Path.

    A tensor or config value of `...` removes the key.
    """

    def make(config=None, tensors=None, folder="adapter"):
        path = tmp_path / folder
        path.mkdir(exist_ok=True)
        (path / "adapter_config.json").write_text(json.dumps(_changed(plain_config(), config)))
        save_file(_changed(plain_tensors(), tensors), path / "adapter_model.safetensors")
        return path

    return make


def plain_config():
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": "base",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q", "v"],
    }


def plain_tensors():
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(4):
        for leaf, width in (("q", 6), ("v", 3)):
            key = f"{PREFIX}layers.{layer}.{leaf}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(2, 5, generator=generator)
            tensors[f"{key}.lora_B.weight"] = torch.randn(width, 2, generator=generator)
    return tensors


def _changed(table, changes):
    merged = {**table, **(changes or {})}
    return {key: value for key, value in merged.items() if value is not ...}


def an_adapter(ranks, *, name="merged", seed=0, **fields):
    """Return an adapter with a module of shape (6, 5) for each rank; `ranks` may be a dict."""
    from icm_ray.adapters import fingerprint_of

    generator = torch.Generator().manual_seed(seed)
    named = ranks if isinstance(ranks, dict) else {f"layers.{i}.q": r for i, r in enumerate(ranks)}
    modules = {
        module: LoRAFactors(
            torch.randn(rank, 5, generator=generator), torch.randn(6, rank, generator=generator)
        )
        for module, rank in named.items()
    }
    fields = {"base_model": "base", "config": {"target_modules": ["q"]}, **fields}
    return Adapter(name=name, modules=modules, fingerprint=fingerprint_of(modules), **fields)


@pytest.fixture
def adapter_of():
    return an_adapter


def raw_safetensors(path: Path, header: bytes, data: bytes = b""):
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
