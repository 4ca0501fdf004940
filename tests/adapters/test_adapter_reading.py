"""What PEFT wrote is what we read: every delta, for the layers and configs PEFT users have."""

import pickle
import warnings

import pytest
import torch
from adapter_samples import CASES, QKV, peft_deltas, relative
from safetensors.torch import load_file, save_file

from icm_ray.adapters import fingerprint_of, load_adapter, open_adapter
from icm_ray.adapters.config_keys import TASK_TYPES
from icm_ray.errors import InputError


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_deltas_are_those_of_peft(make_peft, case, dtype):
    kind, options = CASES[case]
    folder, model = make_peft(kind, dtype=dtype, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT copies a LoRA embedding's base into the file
        adapter = load_adapter(folder)
    products, weights = peft_deltas(model, folder)
    assert adapter.modules.keys() == products.keys()
    assert adapter.dtype == dtype
    for module, expected in products.items():
        assert relative(adapter.modules[module].delta(), expected) <= 1e-6
    tolerance = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    for module, expected in weights.items():
        assert relative(adapter.modules[module].delta(), expected) <= tolerance


@pytest.mark.parametrize("case", CASES)
def test_a_file_and_its_adapter_are_the_same(make_peft, case):
    kind, options = CASES[case]
    file = open_adapter(make_peft(kind, **options)[0])
    adapter = file.load()
    assert file.fingerprint == adapter.fingerprint == fingerprint_of(adapter.modules)
    assert file.shapes == {m: (*f.shape, f.rank) for m, f in adapter.modules.items()}
    assert file.scaling == {m: f.scaling for m, f in adapter.modules.items()}
    for module, factors in file.stream():
        torch.testing.assert_close(factors.b, adapter.modules[module].b, rtol=0, atol=0)
        torch.testing.assert_close(file.factors(module).a, factors.a, rtol=0, atol=0)
    again = pickle.loads(pickle.dumps(file))
    assert again.fingerprint == file.fingerprint


def test_the_fingerprint_sees_values_names_and_nothing_else(make_folder, adapter_of):
    one = open_adapter(make_folder())
    other = open_adapter(make_folder({"lora_dropout": 0.5, "revision": "main"}, folder="b"), "x")
    scaled = open_adapter(make_folder({"lora_alpha": 8}, folder="c"))
    assert one.fingerprint == other.fingerprint != scaled.fingerprint
    plain = adapter_of([2, 3]).modules
    renamed = {module.replace("q", "k"): factors for module, factors in plain.items()}
    assert fingerprint_of(plain) != fingerprint_of(renamed)


def test_scaling_is_folded_after_the_upcast(make_folder):
    key = "base_model.model.layers.0.q.lora_B.weight"
    folder = make_folder(
        {"lora_alpha": 60000}, {key: torch.full((6, 2), 60000.0, dtype=torch.float16)}
    )
    with pytest.warns(UserWarning, match="element types F16, F32 are mixed"):
        adapter = load_adapter(folder)
    assert adapter.modules["layers.0.q"].b.max() == 60000.0 * 30000.0


def test_unknown_modules_are_key_errors(make_folder):
    with pytest.raises(KeyError, match="nowhere"):
        open_adapter(make_folder()).factors("nowhere")


def test_contradicting_alphas_are_told(make_folder):
    file = open_adapter(make_folder({"alpha_pattern": {"layers.0.q": 8, "q": 2}}))
    assert file.scaling["layers.0.q"] == 4
    assert "alpha_pattern: keys contradict each other for 1 modules" in file.warnings[0]


def test_names_and_dtypes(make_folder, tmp_path, monkeypatch):
    folder = make_folder(tensors={k: v.double() for k, v in load_tensors(make_folder()).items()})
    assert load_adapter(folder).name == "adapter"
    assert load_adapter(folder, "task").name == "task"
    assert load_adapter(folder).dtype == torch.float64
    monkeypatch.chdir(folder)
    assert load_adapter(".").name == "adapter"


def load_tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def test_saved_modules_policies(make_folder):
    extra = {"base_model.model.classifier.weight": torch.ones(2, 3)}
    folder = make_folder({"modules_to_save": ["classifier"]}, extra)
    with pytest.raises(InputError, match="modules_to_save: mean, keep or drop") as error:
        load_adapter(folder)
    assert len(error.value.problems) == 1, "told once, and not as an unknown tensor"
    with pytest.warns(UserWarning, match="left out"):
        assert not load_adapter(folder, saved_modules="drop").saved_modules
    kept = load_adapter(folder, saved_modules="keep")
    assert list(kept.saved_modules) == ["classifier.weight"]
    assert "classifier" not in kept.modules


def test_sequence_classifiers_of_peft_are_read_with_their_heads_apart(tmp_path):
    import transformers as hf
    from peft import LoraConfig, get_peft_model

    config = hf.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(
            hf.BertForSequenceClassification(config),
            LoraConfig(task_type="SEQ_CLS", target_modules=QKV, init_lora_weights=False),
        )
        model.save_pretrained(str(tmp_path / "a"))
    adapter = open_adapter(tmp_path / "a", saved_modules="keep").load()
    assert set(adapter.saved_modules) == {"classifier.weight", "classifier.bias"}
    assert len(adapter.modules) == 4


@pytest.mark.parametrize("base", ["https://x.org/m", "/models/m"])
def test_what_is_odd_is_a_warning_of_the_file_and_of_python(make_folder, base):
    folder = make_folder({"base_model_name_or_path": base})
    assert any("path or address of another machine" in w for w in open_adapter(folder).warnings)
    with pytest.warns(UserWarning, match=r"adapter"):
        load_adapter(folder)


def test_a_file_that_shrinks_after_opening_is_told(make_folder):
    folder = make_folder()
    opened = open_adapter(folder)
    save_file({"x": torch.zeros(1)}, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors"):
        opened.factors("layers.0.q")


@pytest.mark.parametrize(
    "config",
    [
        {"task_type": "COOKING"},
        {"target_modules": ".*", "layers_to_transform": [1]},
        {"target_modules": ".*", "layers_pattern": ["layers"]},
        {"target_modules": ["q", "v"], "layers_pattern": ["layers"]},
    ],
    ids=str,
)
def test_what_peft_refuses_is_refused_without_it(make_folder, config):
    from peft import LoraConfig

    with pytest.raises(ValueError, match=r"Invalid task type|layers_pattern|layers_to_transform"):
        LoraConfig(**config)
    with pytest.raises(InputError, match="PEFT"):
        open_adapter(make_folder(config))


def test_task_types_are_those_of_peft():
    from peft import TaskType

    assert set(TASK_TYPES) == {kind.value for kind in TaskType}
