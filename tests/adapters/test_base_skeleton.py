"""Which classes a base may be, and what its files lack or break, before anything is loaded."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from icm_ray.adapters import check_base, open_adapter
from icm_ray.adapters.base_folder import open_base
from icm_ray.adapters.base_skeleton import (
    build,
    is_finite,
    missing_lines,
    missing_weights,
    model_classes,
    own_class,
)
from icm_ray.errors import InputError


@pytest.fixture
def base(tiny_llama, tmp_path):
    return Path(shutil.copytree(tiny_llama, tmp_path / "base"))


def edit(base, **changes):
    file = base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return open_base(base)


def change_weights(base, change):
    file = base / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return open_base(base)


NO_MODELS = ["logging", "pipeline", "Trainer", "AutoTokenizer", "AutoModel", "LlamaConfig"]


@pytest.mark.parametrize("name", [*NO_MODELS, "BertModel", "is_torch_available", "utils"])
def test_no_attribute_but_a_model_class_of_its_kind_is_fetched(base, monkeypatch, name):
    import transformers

    folder = edit(base, architectures=[name])
    monkeypatch.delitem(vars(transformers), name, raising=False)  # where what is fetched is kept
    with pytest.raises(InputError, match=rf'config\.json: architectures: "{name}" but a model'):
        model_classes(folder)
    assert name not in vars(transformers)


@pytest.mark.parametrize("name", NO_MODELS)
def test_a_base_of_no_model_class_ends_the_check(base, make_peft, name):
    edit(base, architectures=[name])
    file = open_adapter(make_peft("llama", r=2, target_modules=["q_proj"])[0])
    with pytest.raises(InputError, match="architectures"):
        check_base([file], base)


def test_model_classes_of_the_kind_are_taken_and_those_of_strangers_passed_over(base):
    import transformers

    assert model_classes(edit(base, architectures=None)) == []
    assert model_classes(edit(base, architectures=["SomebodysLlama"])) == []
    names = ["LlamaForCausalLM", "LlamaModel", "LlamaForSequenceClassification"]
    expected = [getattr(transformers, name) for name in names]
    assert model_classes(edit(base, architectures=names)) == expected
    # Beside the table's class, though in no table: the second text encoder of many pipelines.
    config = transformers.CLIPTextConfig(architectures=["CLIPTextModelWithProjection"])
    (base / "config.json").write_text(json.dumps(config.to_dict()))
    assert model_classes(open_base(base)) == [transformers.CLIPTextModelWithProjection]


def test_every_class_of_transformers_tables_counts_as_a_model(base):
    """What people have is in the tables; none of it may be taken for something else."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as TABLE

    folder = open_base(base)
    for kind in ("llama", "gpt2", "mistral", "gemma", "phi", "bloom", "opt", "t5"):
        name = TABLE.get(kind)
        if isinstance(name, str):
            folder.config.model_type, folder.config.architectures = kind, [name]
            assert [known.__name__ for known in model_classes(folder)] == [name]


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_attention_heads": 0}, "no config of a"),
        ({"num_hidden_layers": 99_999}, "over 2000 modules"),
        ({"hidden_size": 10**30}, "no config of a"),
    ],
)
def test_a_config_of_no_model_is_named_in_bounded_time(base, changes, text, monkeypatch):
    monkeypatch.setattr("icm_ray.adapters.base_skeleton.MAX_MODULES", 2000)
    started = time.monotonic()

    def build_changed():
        folder = edit(base, **changes)
        build(folder, own_class(folder.config))

    with pytest.raises(InputError, match=rf"base/config\.json: {text}"):
        build_changed()
    assert time.monotonic() - started < 30


def test_the_bound_ends_with_the_building(base, monkeypatch):
    monkeypatch.setattr("icm_ray.adapters.base_skeleton.MAX_MODULES", 2)
    folder = open_base(base)
    with pytest.raises(InputError, match="over 2 modules"):
        build(folder, own_class(folder.config))
    torch.nn.Sequential(*(torch.nn.Identity() for _ in range(9)))


def test_a_whole_base_is_nothing_to_warn_about(base):
    assert missing_lines(base, missing_weights(open_base(base))) == []


def test_weights_the_files_lack_are_told_as_random(base):
    folder = change_weights(base, lambda t: t.pop("model.layers.1.self_attn.q_proj.weight"))
    absent = missing_weights(folder)
    assert absent == ["model.layers.1.self_attn.q_proj.weight"]
    assert missing_lines(base, absent) == [
        f"{base}: model.layers.1.self_attn.q_proj.weight: not among the weights, so random numbers "
        "stand in."
    ]


def test_a_tied_head_is_not_missed(base):
    assert "lm_head.weight" not in open_base(base).tensors
    assert missing_weights(open_base(base)) == []


def test_weights_of_another_shape_are_refused(base):
    folder = change_weights(base, lambda t: t.update({"model.norm.weight": torch.ones(17)}))
    with pytest.raises(InputError) as error:
        missing_weights(folder)
    assert error.value.problems == (
        f"{base}: model.norm.weight: [17] but [16] is expected, as config.json says. Download the "
        "base again.",
    )


def test_finiteness_is_of_every_kind_of_tensor():
    assert is_finite(torch.arange(3))
    assert is_finite(torch.empty(0))
    assert is_finite(torch.tensor([3e38, -3e38]))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for value in (float("nan"), float("inf"), -float("inf")):
            assert not is_finite(torch.tensor([1.0, value, 2.0], dtype=dtype))
