"""Adapters of one base whose module names are of two releases of transformers."""

import shutil
import warnings

import pytest
import torch
from adapter_samples import an_adapter
from safetensors.torch import load_file, save_file

from icm_ray import merge
from icm_ray.adapters import check_base, check_together, fit_base, open_all
from icm_ray.adapters.base_folder import open_base
from icm_ray.adapters.renaming import FAMILIES, changed_names, renamings
from icm_ray.errors import InputError

LLAVA, QWEN, TOWER = FAMILIES
Q = "layers.0.self_attn.q_proj"
RENAMED = {
    "llava": (LLAVA, f"language_model.model.{Q}", f"model.language_model.{Q}"),
    "llava head": (LLAVA, "language_model.lm_head", "lm_head"),
    "llava tower": (LLAVA, "vision_tower.vision_model.a", "model.vision_tower.vision_model.a"),
    "mllama tower": (LLAVA, "vision_model.patch_embedding", "model.vision_model.patch_embedding"),
    "audio": (LLAVA, "audio_tower.layers.0.fc1", "model.audio_tower.layers.0.fc1"),
    "projector": (LLAVA, "multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1"),
    "qwen-vl text": (QWEN, f"model.{Q}", f"model.language_model.{Q}"),
    "qwen-vl sight": (QWEN, "visual.blocks.0.attn.qkv", "model.visual.blocks.0.attn.qkv"),
    "siglip": (TOWER, f"vision_model.encoder.{Q}", f"encoder.{Q}"),
    "new already": (LLAVA, f"model.language_model.{Q}", None),
    "another model": (QWEN, "model.layersize.q", None),
}


@pytest.mark.parametrize("case", RENAMED)
def test_old_names_become_what_transformers_makes_of_them(case):
    family, old, new = RENAMED[case]
    assert changed_names([old], family) == ({old: new} if new else {})


def test_names_that_would_become_one_are_left_alone():
    both = [f"model.{Q}", f"model.language_model.{Q}"]
    assert changed_names(both, QWEN) == {}


def test_names_change_towards_another_adapter_only():
    old, new = f"model.{Q}", f"model.language_model.{Q}"
    assert renamings({"a": [old], "b": [old]}) == {}
    assert renamings({"a": [old], "b": [f"layers.0.{Q}"]}) == {}
    assert renamings({"a": [old], "b": [new], "c": [old]}) == {"a": {old: new}, "c": {old: new}}
    shared = {"a": [old, "lm_head"], "b": [new, "lm_head"]}
    assert renamings(shared) == {"a": {old: new}}, "a common head hides nothing"


def llava():
    import transformers as hf

    torch.manual_seed(0)
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**tower, num_hidden_layers=2, vocab_size=32),
        vision_config=hf.CLIPVisionConfig(**tower, num_hidden_layers=1, image_size=8, patch_size=4),
        image_token_index=30,
    )
    return hf.LlavaForConditionalGeneration(config).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(9)[None]).logits


@pytest.fixture
def old_and_new(tmp_path):
    """Return a folder with two adapters of a LLaVA; `old` is saved as before transformers 4.52."""
    from peft import LoraConfig, get_peft_model

    for seed, name in enumerate(("new", "old")):
        torch.manual_seed(seed)
        model = get_peft_model(llava(), LoraConfig(r=2, target_modules=r".*language_model.*q_proj"))
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(str(tmp_path / name))
    shutil.copytree(tmp_path / "old", tmp_path / "current")
    file = tmp_path / "old" / "adapter_model.safetensors"
    tensors = {
        key.replace("model.model.language_model.", "model.language_model.model."): tensor
        for key, tensor in load_file(file).items()
    }
    save_file(tensors, file)
    return tmp_path


def test_an_adapter_of_an_old_release_counts_as_peft_counts_it(old_and_new):
    from peft import PeftModel

    names = ("new", "old")
    files = open_all([(name, old_and_new / name) for name in names])
    assert files[0].shapes.keys() == files[1].shapes.keys()
    assert [bool(file.names) for file in files] == [False, True]
    told = [line for line in files[1].warnings if "another release of transformers" in line]
    assert len(told) == 1
    assert check_together(files) == []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = {n: PeftModel.from_pretrained(llava(), old_and_new / n) for n in names}
        now = PeftModel.from_pretrained(llava(), old_and_new / "current")
    torch.testing.assert_close(logits(theirs["old"]), logits(now))
    merged = merge(files, "task_arithmetic", params={"scale": 1.0}).adapter
    layers = dict(now.get_base_model().named_modules())
    others = dict(theirs["new"].get_base_model().named_modules())
    for module, factors in merged.modules.items():
        expected = sum(m[module].get_delta_weight("default") for m in (layers, others))
        torch.testing.assert_close(factors.delta(), expected.detach(), rtol=1e-4, atol=1e-5)


def test_a_renamed_adapter_keeps_its_fingerprint(old_and_new):
    alone = open_all([("old", old_and_new / "old")])[0]
    renamed = open_all([("new", old_and_new / "new"), ("old", old_and_new / "old")])[1]
    assert renamed.fingerprint == alone.fingerprint
    assert renamed.load().modules.keys() != alone.load().modules.keys()


def test_names_of_an_old_release_fit_the_base_as_it_is_built_today(old_and_new, tmp_path):
    llava().save_pretrained(tmp_path / "base")
    old = open_all([("old", old_and_new / "old")])
    with pytest.raises(InputError, match="not in the base model"):
        check_base(old, tmp_path / "base")
    fitted = fit_base(old, open_base(tmp_path / "base"))
    check_base(fitted, tmp_path / "base")
    assert fitted[0].fingerprint == old[0].fingerprint
    current = open_all([("current", old_and_new / "current")])
    assert fit_base(current, open_base(tmp_path / "base")) == current


def test_loaded_adapters_are_brought_together_too():
    new = an_adapter({f"model.language_model.{Q}": 2}, name="new")
    old = an_adapter({f"language_model.model.{Q}": 2}, name="old", seed=1)
    with pytest.warns(UserWarning, match="old: module names of another release"):
        merged = merge([new, old], "task_arithmetic", params={"scale": 1.0}).adapter
    assert list(merged.modules) == list(new.modules)
    both = [next(iter(one.modules.values())).delta() for one in (new, old)]
    torch.testing.assert_close(next(iter(merged.modules.values())).delta(), both[0] + both[1])


def test_a_prefix_that_peft_does_not_read_is_refused_by_name():
    head = an_adapter({f"model.{Q}": 2}, name="head")
    bare = an_adapter({Q: 2}, name="bare", seed=1)
    with pytest.raises(InputError, match=r"bare .*Only the prefix 'model\.' differs") as error:
        merge([head, bare], "soup")
    assert len(error.value.problems) == 1
    other = an_adapter({"encoder.layer.0.query": 2}, name="other", seed=2)
    with pytest.raises(InputError, match="modules in common are expected"):
        merge([head, other], "soup")


def test_two_groups_without_a_common_module_are_refused_and_a_chain_is_not():
    chain = [
        an_adapter(dict.fromkeys(pair, 1), name=f"n{i}", seed=i)
        for i, pair in enumerate((("x", "y"), ("y", "z"), ("z", "w")))
    ]
    assert "no module is in every adapter" in check_together(chain)[0]
    with pytest.raises(InputError, match="modules in common"):
        check_together([chain[0], chain[2]])
