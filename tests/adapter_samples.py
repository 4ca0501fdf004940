"""Small models, plain adapters and raw files for the tests of reading and writing adapters."""

from pathlib import Path

import torch

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


def changed(table, changes):
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


def raw_safetensors(path: Path, header: bytes, data: bytes = b""):
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


QKV = ["query", "value"]
CASES = {
    "bert list": ("bert", {"r": 4, "target_modules": QKV}),
    "bert patterns": (
        "bert",
        {
            "r": 4,
            "target_modules": QKV,
            "rank_pattern": {r"layer\.1\..*\.query": 8, "query": 2},
            "alpha_pattern": {"layer.0.attention.self.value": 32, "query|value": 5},
        },
    ),
    "bert rslora": ("bert", {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": QKV}),
    "bert embedding": ("bert", {"r": 3, "target_modules": ["word_embeddings", "query"]}),
    "gpt2 conv1d": ("gpt2", {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "llama regex": ("llama", {"r": 4, "target_modules": r".*\.(q_proj|v_proj)"}),
    "llama all-linear": (
        "llama",
        {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"},
    ),
    "llama unsloth": (
        "llama",
        {"r": 2, "target_modules": r"(?:.*?(?:model).*?(?:self_attn|mlp).*?(?:q_proj|up_proj)).*?"},
    ),
    "vit": ("vit", {"r": 40, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}),
    "conv": ("conv", {"r": 2, "lora_alpha": 3, "target_modules": ["0", "1", "2"]}),
}


def peft_deltas(model, folder):
    """Return PEFT's own B @ A * scaling in float32, and its get_delta_weight, by module."""
    from peft.tuners.lora import LoraLayer

    products, weights = {}, {}
    for name, layer in model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if layer.lora_embedding_A:
            a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        else:
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        name = name.removeprefix("base_model.model.")
        scaling = layer.scaling["default"]
        products[name] = (b.float().flatten(1) @ a.float().flatten(1)).detach() * scaling
        if a.dim() == 3:
            continue  # PEFT 0.21 fails for Conv1d
        weight = layer.get_delta_weight("default").float().detach()
        transposed = layer.lora_embedding_A or getattr(layer, "fan_in_fan_out", False)
        weights[name] = (weight.T if transposed else weight).flatten(1)
    return products, weights


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())
