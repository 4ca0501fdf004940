"""Adapters on a base without touching it: the same forward as PEFT's, and nothing left behind."""

import warnings

import pytest
import torch
from torch import nn

from icm_ray.adapters import load_adapter
from icm_ray.base_model.loading import find_module
from icm_ray.base_model.low_rank import applied
from icm_ray.errors import InputError
from icm_ray.types import Adapter, LoRAFactors

IDS = torch.tensor([[2, 5, 6, 7, 3], [2, 8, 3, 0, 0]])


def build(kind: str) -> nn.Module:
    import transformers as hf

    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16}
    if kind == "bert":
        return hf.BertModel(hf.BertConfig(**sizes, intermediate_size=24, vocab_size=20))
    if kind == "gpt2":
        return hf.GPT2Model(hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20))
    if kind == "llama":
        return hf.LlamaModel(
            hf.LlamaConfig(**sizes, intermediate_size=24, vocab_size=20, num_key_value_heads=1)
        )
    return hf.ViTModel(hf.ViTConfig(**sizes, intermediate_size=24, image_size=8, patch_size=4))


def run(kind: str, model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        if kind == "vit":
            pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
            return model(pixel_values=pixels).last_hidden_state
        return model(input_ids=IDS, attention_mask=(IDS > 0).long()).last_hidden_state


TARGETS = {
    "bert": ["query", "output.dense", "word_embeddings"],
    "gpt2": ["c_attn", "c_fc", "wte"],
    "llama": ["q_proj", "down_proj", "embed_tokens"],
    "vit": ["query", "fc1", "dense", "projection"],  # projection is the convolution over patches
}


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("rslora", [False, True])
def test_the_forward_equals_peft_s(kind: str, rslora: bool, tmp_path) -> None:
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = build(kind).eval()
        before = {name: weight.clone() for name, weight in base.state_dict().items()}
        plain = run(kind, base)
        names = [n for n, _ in base.named_modules() if n.endswith(tuple(TARGETS[kind]))]
        config = LoraConfig(r=3, lora_alpha=5, use_rslora=rslora, target_modules=names)
        wrapped = get_peft_model(build(kind), config).eval()
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        wrapped.save_pretrained(str(tmp_path))
        adapter = load_adapter(tmp_path)
    expected = run(kind, wrapped)
    assert not torch.allclose(expected, plain, atol=1e-2), "the adapter changes something"
    with applied(base, adapter):
        torch.testing.assert_close(run(kind, base), expected, rtol=1e-4, atol=2e-5)
    assert torch.equal(run(kind, base), plain)
    with applied(base, None):
        assert torch.equal(run(kind, base), plain)
    for name, weight in base.state_dict().items():
        assert torch.equal(weight, before[name])
    kinds = {layout.partition(":")[0] for layout in adapter.layouts.values()}
    assert kinds == ({"conv"} if kind == "vit" else {"embedding"})


class Convolutions(nn.Module):
    """A 1-d convolution with stride and padding, and one with dilation."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(3, 4, 3, stride=2, padding=1)
        self.two = nn.Conv2d(1, 5, (2, 3), dilation=(1, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(x)[:, None])


def test_convolutions_equal_a_changed_weight(adapter_around) -> None:
    torch.manual_seed(0)
    model, x = Convolutions(), torch.randn(2, 3, 20)
    one = LoRAFactors(torch.randn(2, 9), torch.randn(4, 2))
    two = LoRAFactors(torch.randn(1, 6), torch.randn(5, 1))
    layouts = {"one": "conv:3", "two": "conv:2x3"}
    with (
        torch.no_grad(),
        applied(model, adapter_around("x", {"one": one, "two": two}, layouts=layouts)),
    ):
        found = model(x)
    with torch.no_grad():
        model.one.weight += one.delta().reshape(model.one.weight.shape)
        model.two.weight += two.delta().reshape(model.two.weight.shape)
        torch.testing.assert_close(found, model(x), rtol=1e-4, atol=1e-4)


def adapter_of(modules: dict[str, LoRAFactors]) -> Adapter:
    return Adapter("x", None, modules, {}, fingerprint="")


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture
def small() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.LayerNorm(2), nn.ReLU())


def test_hooks_are_gone_after_an_exception(small) -> None:
    adapter = adapter_of({"0": LoRAFactors(torch.ones(1, 3), torch.ones(4, 1))})
    with pytest.raises(RuntimeError, match="mat1 and mat2"), applied(small, adapter):
        small(torch.ones(1, 7))
    assert hooks(small) == 0
    with applied(small, adapter):
        assert hooks(small) == 1
    assert hooks(small) == 0


@pytest.mark.parametrize(
    ("module", "shape", "words"),
    [
        ("1", (4, 2), r"the base's change is \(2, 4\) but the adapter's delta is \(4, 2\)"),
        ("1", (2, 5), "The adapter belongs to another base"),
        ("2", (2, 2), "has no weight matrix"),
        ("3", (2, 2), "has no weight matrix"),
        ("9", (2, 2), "module 9: not in Sequential"),
    ],
)
def test_adapters_of_another_base_are_refused(small, module: str, shape, words: str) -> None:
    factors = LoRAFactors(torch.ones(1, shape[1]), torch.ones(shape[0], 1))
    fits = LoRAFactors(torch.ones(1, 3), torch.ones(4, 1))
    with (
        pytest.raises(InputError, match=words),
        applied(small, adapter_of({"0": fits, module: factors})),
    ):
        pass
    assert hooks(small) == 0


def test_half_precision_bases_are_served_in_their_dtype(small) -> None:
    adapter = adapter_of({"0": LoRAFactors(torch.ones(1, 3), torch.ones(4, 1))})
    half = small[:2].to(torch.bfloat16)
    with torch.no_grad(), applied(half, adapter):
        assert half(torch.ones(1, 3, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_modules_are_found_with_and_without_the_head_s_prefix() -> None:
    bert = build("bert")
    assert find_module(bert, "encoder.layer.0") is bert.encoder.layer[0]
    assert find_module(bert, "bert.encoder.layer.0") is bert.encoder.layer[0]
    from transformers import BertForMaskedLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        headed = BertForMaskedLM(bert.config)
    assert find_module(headed, "encoder.layer.0") is headed.bert.encoder.layer[0]
    with pytest.raises(InputError, match=r"module encoder\.layer\.7: not in BertModel"):
        find_module(bert, "encoder.layer.7")
