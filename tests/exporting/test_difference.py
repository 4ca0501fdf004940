"""An adapter out of two whole models is what was trained, as far as linear layers hold it."""

import json
import warnings

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from icm_ray import load_adapter
from icm_ray.errors import InputError, RecipeError
from icm_ray.exporting import extract_adapter

TEXT = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "vocab_size": 64}
TOKENS = torch.arange(24).view(2, 12)
WEIGHTS = "model.safetensors"
MODELS = {
    "llama": lambda: hf.LlamaForCausalLM(
        hf.LlamaConfig(**TEXT, intermediate_size=48, num_key_value_heads=2)
    ),
    "bert": lambda: hf.BertModel(hf.BertConfig(**TEXT, intermediate_size=48)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, eos_token_id=1)
    ),
}
TRAINED = {"llama": "q_proj", "bert": "query", "gpt2": "c_attn"}


@pytest.fixture
def pair(tmp_path):
    """Return a function that saves a model, and the same after a low-rank change of some layers."""

    def saved(name, rank=3, dtype=torch.float32, *, shard_size="5GB"):
        torch.manual_seed(0)
        model = MODELS[name]().to(dtype).eval()
        model.save_pretrained(tmp_path / "base", max_shard_size=shard_size)
        with torch.no_grad():
            for module, layer in model.named_modules():
                if module.endswith(TRAINED[name]):
                    d = layer.weight.shape
                    layer.weight += 0.1 * (torch.randn(d[0], rank) @ torch.randn(rank, d[1]))
        model.save_pretrained(tmp_path / "tuned", max_shard_size=shard_size)
        return model

    return saved


def extract(tmp_path, rank=3):
    return extract_adapter(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank)


@pytest.mark.parametrize("name", MODELS)
def test_the_base_with_the_adapter_is_the_trained_model(tmp_path, pair, name):
    from peft import PeftModel

    model = pair(name)
    found = extract(tmp_path)
    assert (found.modules, found.rank, found.left_out) == (2, 3, {})
    assert found.kept == pytest.approx(1, abs=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == [TRAINED[name]]
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    base = type(model).from_pretrained(tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "out")).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS)[0], model(TOKENS)[0], atol=2e-5, rtol=0)


def test_shards_and_half_precision(tmp_path, pair):
    model = pair("llama", dtype=torch.bfloat16, shard_size="20KB")
    extract(tmp_path)
    adapter = load_adapter(tmp_path / "out")
    assert adapter.dtype == torch.bfloat16
    base = MODELS["llama"]().from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    for module, factors in adapter.modules.items():
        pairs = (one.get_submodule(module).weight.float() for one in (model, base))
        truth = next(pairs) - next(pairs)
        assert (factors.delta() - truth).norm() < 0.02 * truth.norm()


def test_a_cut_says_what_it_keeps(tmp_path, pair):
    pair("bert", rank=8)
    whole, cut = extract(tmp_path, "exact"), extract(tmp_path, 2)
    assert (whole.kept, whole.rank) == (pytest.approx(1, abs=1e-5), 8)
    assert 0.2 < cut.kept < 0.9
    assert extract(tmp_path, "energy:0.9").kept >= 0.9


def changed(folder, **tensors):
    stored = load_file(folder / WEIGHTS)
    save_file({**stored, **tensors}, folder / WEIGHTS, metadata={"format": "pt"})


def test_what_no_linear_layer_holds_is_said(tmp_path, pair):
    pair("llama")
    stored = load_file(tmp_path / "tuned" / WEIGHTS)
    norm, words = "model.norm.weight", "model.embed_tokens.weight"
    changed(tmp_path / "tuned", **{norm: stored[norm] + 0.5, words: stored[words][:60]})
    found = extract(tmp_path)
    assert found.left_out.keys() == {norm, words}
    assert 0 < found.left_out[norm] < 1
    assert found.kept == pytest.approx(1 - found.left_out[norm], abs=1e-4)
    (line,) = found.lines
    assert norm in line
    assert words in line


def test_layers_that_did_not_change_are_not_selected_by_their_short_name(tmp_path, pair):
    pair("llama")
    key = "model.layers.0.self_attn.q_proj.weight"
    changed(tmp_path / "tuned", **{key: load_file(tmp_path / "base" / WEIGHTS)[key]})
    assert extract(tmp_path).modules == 1
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["model.layers.1.self_attn.q_proj"]


def test_what_cannot_be_taken_apart_is_refused(tmp_path, pair):
    pair("llama")
    with pytest.raises(InputError, match="no linear layer differs"):
        extract_adapter(tmp_path / "base", tmp_path / "base", tmp_path / "out")
    with pytest.raises(RecipeError, match="rank: 'total:8'"):
        extract(tmp_path, "total:8")
    with pytest.raises(RecipeError, match=r"output\.rank"):
        extract(tmp_path, "most")
    key = "model.layers.0.mlp.up_proj.weight"
    stored = load_file(tmp_path / "tuned" / WEIGHTS)
    changed(tmp_path / "tuned", **{key: stored[key] * float("nan")})
    with pytest.raises(InputError, match=r"up_proj\.weight: NaN or infinity"):
        extract(tmp_path)
    stored["extra.weight"] = torch.zeros(2, 2)
    save_file(stored, tmp_path / "tuned" / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"extra\.weight but the same tensors in both models"):
        extract(tmp_path)
    MODELS["bert"]().save_pretrained(tmp_path / "tuned2")
    with pytest.raises(InputError, match='a "bert" but a "llama" as the base is expected'):
        extract_adapter(tmp_path / "tuned2", tmp_path / "base", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(cli, tmp_path, pair):
    pair("llama")
    words = ["--base", tmp_path / "base", "-o", tmp_path / "out"]
    code, out, _ = cli("extract", tmp_path / "tuned", *words, "--rank", "3")
    assert code == 0
    assert "2 layers, rank 3, 100.00% of all change" in out
    code, _, err = cli("extract", tmp_path / "tuned", *words, "--rank", "many")
    assert code == 2
    assert "output.rank: 'many'" in err
