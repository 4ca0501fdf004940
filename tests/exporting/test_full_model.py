"""A whole model's outputs against PEFT's own merge, and what cannot be exported."""

import json
import warnings

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from icm_ray.adapters import open_adapter
from icm_ray.errors import InputError
from icm_ray.exporting import export_model
from icm_ray.exporting import full_model as module_of_export

TEXT = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32, "vocab_size": 64}
TOKENS = torch.arange(24).view(2, 12)


def llama(**changes):
    config = hf.LlamaConfig(**TEXT, intermediate_size=48, num_key_value_heads=2, **changes)
    return hf.LlamaForCausalLM(config)


MODELS = {
    "llama": (llama, ["q_proj", "down_proj"]),
    "bert": (
        lambda: hf.BertModel(hf.BertConfig(**TEXT, intermediate_size=48)),
        ["query", "word_embeddings", "output.dense"],
    ),
    "bert with a head": (
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**TEXT, intermediate_size=48)),
        ["query", "intermediate.dense"],
    ),
    "gpt2": (
        lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, eos_token_id=1)
        ),
        ["c_attn", "c_proj"],
    ),
    "llama in bfloat16": (lambda: llama().to(torch.bfloat16), ["v_proj"]),
}


def random_lora(model, targets, **options):
    """Return the model with a random LoRA in PEFT."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(
            model, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": targets, **options})
        )
    torch.manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return wrapped.eval()


@pytest.fixture
def make(tmp_path):
    """Return a function that saves a base and a random LoRA, and returns the wrapped model."""

    def saved(model, targets, *, shard_size="5GB", **options):
        model.eval().save_pretrained(tmp_path / "base", max_shard_size=shard_size)
        (tmp_path / "base" / "tokenizer.json").write_text("{}")
        (tmp_path / "base" / "modeling_own.py").write_text("raise SystemExit")
        wrapped = random_lora(model, targets, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
        return wrapped

    return saved


def export(tmp_path):
    export_model(open_adapter(tmp_path / "adapter"), tmp_path / "base", tmp_path / "out")
    return tmp_path / "out"


def outputs(model):
    with torch.no_grad():
        return model(TOKENS)[0].float()


def difference(model, folder):
    loaded, info = type(model).from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return float((outputs(loaded.eval()) - outputs(model)).abs().max())


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_exported_model_says_what_pefts_merge_says(tmp_path, make, kind, shard_size):
    build, targets = MODELS[kind]
    torch.manual_seed(0)
    before = outputs(build().eval())
    torch.manual_seed(0)
    wrapped = make(build(), targets, shard_size=shard_size)
    out = export(tmp_path)
    merged = wrapped.merge_and_unload()
    assert float((outputs(merged) - before).abs().max()) > 1e-3, "the adapter changes something"
    assert difference(merged, out) < (2e-2 if "bfloat16" in kind else 1e-6)
    assert len(list(out.glob("*.safetensors"))) == len(
        list((tmp_path / "base").glob("*.safetensors"))
    )
    assert (out / "tokenizer.json").is_file()
    assert not (out / "modeling_own.py").exists()


def test_what_the_adapter_does_not_name_keeps_its_bits_and_its_type(tmp_path, make):
    make(llama().to(torch.bfloat16), ["q_proj"])
    old = load_file(tmp_path / "base" / "model.safetensors")
    new = load_file(export(tmp_path) / "model.safetensors")
    assert old.keys() == new.keys()
    for key, value in old.items():
        assert new[key].dtype == value.dtype
        assert torch.equal(new[key], value) == ("q_proj" not in key)


def test_blocks_of_rows_give_the_same_model(tmp_path, make, monkeypatch):
    make(llama(), ["down_proj", "q_proj"])
    whole = load_file(export(tmp_path) / "model.safetensors")
    monkeypatch.setattr(module_of_export, "BLOCK_ELEMENTS", 100)
    pieces = load_file(export(tmp_path) / "model.safetensors")
    assert all(torch.allclose(whole[key], pieces[key], rtol=0, atol=1e-6) for key in whole)


@pytest.mark.parametrize("shard_size", ["5GB", "20KB"])
@pytest.mark.parametrize("targets", [["embed_tokens", "q_proj"], ["lm_head"]])
def test_a_change_of_one_tied_embedding_leaves_the_other_alone(tmp_path, make, targets, shard_size):
    torch.manual_seed(0)
    wrapped = make(llama(tie_word_embeddings=True), targets, shard_size=shard_size)
    out = export(tmp_path)
    loaded = hf.LlamaForCausalLM.from_pretrained(out).eval()
    assert float((outputs(loaded) - outputs(wrapped)).abs().max()) < 1e-6
    assert not loaded.config.tie_word_embeddings
    assert loaded.lm_head.weight.data_ptr() != loaded.model.embed_tokens.weight.data_ptr()


def test_tied_embeddings_that_no_module_changes_stay_tied(tmp_path, make):
    wrapped = make(llama(tie_word_embeddings=True), ["q_proj"])
    out = export(tmp_path)
    assert difference(wrapped.merge_and_unload(), out) < 1e-6
    assert (out / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()


def test_a_masked_model_gets_its_own_decoder_when_its_embedding_changes(tmp_path, make):
    torch.manual_seed(0)
    model = hf.BertForMaskedLM(hf.BertConfig(**TEXT, intermediate_size=48))
    wrapped = make(model, ["word_embeddings"])
    loaded = hf.BertForMaskedLM.from_pretrained(export(tmp_path)).eval()
    assert float((outputs(loaded) - outputs(wrapped)).abs().max()) < 1e-6


def test_a_base_saved_without_its_head_has_the_same_weights_by_shorter_names(tmp_path, make):
    torch.manual_seed(0)
    model = hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, eos_token_id=1)
    )
    wrapped = make(model, ["c_attn"])
    file = tmp_path / "base" / "model.safetensors"
    bare = {k.removeprefix("transformer."): v for k, v in load_file(file).items()}
    save_file(bare, file, metadata={"format": "pt"})
    out = export(tmp_path)
    loaded = hf.GPT2LMHeadModel.from_pretrained(out).eval()
    assert float((outputs(loaded) - outputs(wrapped.merge_and_unload())).abs().max()) < 1e-6


def problems_of(tmp_path):
    with pytest.raises(InputError) as error:
        export(tmp_path)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*")), "nothing half written is left"
    return error.value.problems


def change_config(tmp_path, **changes):
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_a_quantised_base_is_refused(tmp_path, make):
    make(llama(), ["q_proj"])
    change_config(tmp_path, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "quantised base" in problems_of(tmp_path)[0]


def test_a_base_in_numbers_no_change_can_be_added_to_is_refused(tmp_path, make):
    make(llama(), ["q_proj"])
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    small = {k: v.to(torch.float8_e4m3fn) for k, v in tensors.items() if "q_proj" in k}
    save_file({**tensors, **small}, file)
    problems = problems_of(tmp_path)
    assert len(problems) == 2
    assert all("F8_E4M3 but one of" in line for line in problems)


def test_another_base_is_refused_by_every_module(tmp_path, make):
    make(llama(), ["q_proj"])
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    tensors["model.layers.1.self_attn.q_proj.weight"] = torch.ones(32, 16)
    save_file(tensors, file)
    missing, other = problems_of(tmp_path)
    assert "layers.0.self_attn.q_proj: no weight" in missing
    assert "layers.1.self_attn.q_proj: [32, 16] but [32, 32]" in other


def test_a_change_that_the_stored_type_cannot_hold_is_refused(tmp_path, make):
    make(llama().to(torch.float16), ["q_proj"])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({key: value.float() * 1e4 for key, value in load_file(file).items()}, file)
    problems = problems_of(tmp_path)
    assert len(problems) == 2
    assert all("values that the base's F16 cannot hold" in line for line in problems)


def test_tied_weights_that_cannot_be_untied_are_refused(tmp_path, make):
    config = hf.T5Config(d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8, vocab_size=64)
    make(hf.T5ForConditionalGeneration(config), ["lm_head"], task_type="SEQ_2_SEQ_LM")
    assert "tied in an encoder-decoder" in problems_of(tmp_path)[0]


def test_a_tied_weight_that_is_stored_twice_is_refused(tmp_path, make):
    make(llama(tie_word_embeddings=True), ["lm_head"])
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}, file)
    assert "stored as lm_head.weight and model.embed_tokens.weight" in problems_of(tmp_path)[0]


def test_an_index_that_leaves_the_folder_is_refused(tmp_path, make):
    make(llama(), ["q_proj"], shard_size="20KB")
    index = tmp_path / "base" / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    key = next(iter(table["weight_map"]))
    table["weight_map"][key] = "../elsewhere.safetensors"
    index.write_text(json.dumps(table))
    assert "a file beside the index" in problems_of(tmp_path)[0]


@pytest.mark.parametrize("place", ["base", "adapter", ".", "base/out"])
def test_an_output_that_is_an_input_is_refused(tmp_path, make, place):
    make(llama(), ["q_proj"])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match="inputs stay as they are"):
        export_model(open_adapter(tmp_path / "adapter"), tmp_path / "base", tmp_path / place)
    assert sorted(tmp_path.rglob("*")) == before
