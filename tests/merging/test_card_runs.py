"""The Python on a model card, run as it stands, for every task type PEFT knows."""

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from icm_ray.adapters import open_all
from icm_ray.config import MergeRecipe
from icm_ray.merging.merge import merge_as_asked
from icm_ray.merging.recipe import merge_recipe

TEXT = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
LLAMA = {**TEXT, "num_attention_heads": 2, "num_key_value_heads": 2}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
KINDS = {
    "CAUSAL_LM": ("LlamaForCausalLM", "q_proj"),
    "FEATURE_EXTRACTION": ("LlamaModel", "q_proj"),
    "SEQ_CLS": ("LlamaForSequenceClassification", "q_proj"),
    "TOKEN_CLS": ("LlamaForTokenClassification", "q_proj"),
    "QUESTION_ANS": ("LlamaForQuestionAnswering", "q_proj"),
    "SEQ_2_SEQ_LM": ("T5ForConditionalGeneration", "q"),
    None: ("LlamaForCausalLM", "q_proj"),
}
WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def fresh(kind: str, labels: int = 2):
    """Return a tiny random model, the same at every call but for the numbers of its head."""
    import transformers as hf

    torch.manual_seed(0)
    if kind.startswith("T5"):
        return hf.T5ForConditionalGeneration(hf.T5Config(**T5, decoder_start_token_id=0)).eval()
    return getattr(hf, kind)(hf.LlamaConfig(**LLAMA, num_labels=labels, pad_token_id=0)).eval()


def outputs(model):
    tokens = torch.arange(1, 9)[None]
    inputs = {"input_ids": tokens}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens
    with torch.no_grad():
        return model(**inputs)[0]


@pytest.fixture
def trained(tmp_path):
    """Return a function that saves two adapters as PEFT does, and their base."""

    def save(task: str | None, *, labels: int = 2, kinds: tuple[str | None, ...] = ()):
        from peft import LoraConfig, get_peft_model

        folders = {}
        for seed, own in enumerate(kinds or (task, task)):
            kind, target = KINDS[own]
            model = get_peft_model(
                fresh(kind, labels), LoraConfig(task_type=own, r=2, target_modules=[target])
            )
            torch.manual_seed(seed)
            for name, parameter in model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    torch.nn.init.normal_(parameter, std=0.5)
            folders[f"t{seed}"] = tmp_path / f"t{seed}"
            model.save_pretrained(str(folders[f"t{seed}"]))
        fresh(KINDS[task][0]).save_pretrained(tmp_path / "base")
        return folders, tmp_path / "base"

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield save


def merged(folders, target: Path, policy: str):
    recipe = MergeRecipe.model_validate(
        {
            "adapters": [{"name": n, "path": str(p)} for n, p in folders.items()],
            "method": "soup",
            "modules_to_save": policy,
            "output": {"path": str(target)},
        }
    )

    def serial(files, request):
        return merge_as_asked([file.load() for file in files], request), 0.0

    merge_recipe(recipe, target, serial)
    return target


def run_card(folder: Path, base: Path) -> dict:
    code = (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace('"BASE_MODEL"', repr(str(base)))
    code = code.replace('"PATH_TO_THIS_FOLDER"', repr(str(folder)))
    space: dict = {}
    exec(code, space)
    return space


def assert_applied(model, folders):
    """Each adapted layer changes by the mean of what the files hold."""
    from peft.tuners.lora import LoraLayer

    files = open_all(list(folders.items()), "drop")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert len(layers) == len(files[0].shapes)
    for name, layer in layers.items():
        module = name.removeprefix("base_model.model.")
        expected = sum(file.factors(module).delta() for file in files) / len(files)
        found = layer.get_delta_weight("default").detach()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("task", KINDS)
def test_the_card_loads_the_merge_for_every_task_type(trained, tmp_path, task):
    folders, base = trained(task)
    target = merged(folders, tmp_path / "out", "drop")
    space = run_card(target, base)
    assert type(space["base"]).__name__ == KINDS[task][0]
    assert_applied(space["model"], folders)


@pytest.mark.parametrize("task", WITH_HEADS)
def test_the_card_lays_a_kept_head_over_the_base(trained, tmp_path, task):
    labels = 2 if task == "QUESTION_ANS" else 3
    folders, base = trained(task, labels=labels)
    target = merged(folders, tmp_path / "out", "keep")
    space = run_card(target, base)
    assert_applied(space["model"], folders)
    head = load_file(target / "saved_modules" / "t0.safetensors")
    assert head
    own = space["model"].get_base_model().state_dict()
    for name, tensor in head.items():
        assert torch.equal(own[name], tensor), name


@pytest.mark.parametrize("task", WITH_HEADS)
def test_the_card_loads_the_mean_of_the_heads_with_peft(trained, tmp_path, task):
    labels = 2 if task == "QUESTION_ANS" else 3
    folders, base = trained(task, labels=labels)
    target = merged(folders, tmp_path / "out", "mean")
    assert not (target / "saved_modules").exists()
    space = run_card(target, base)
    assert_applied(space["model"], folders)
    heads = [file.whole_layers() for file in open_all(list(folders.items()), "keep")]
    found = {
        name.replace(".modules_to_save.default", "").removeprefix("base_model.model."): tensor
        for name, tensor in space["model"].state_dict().items()
        if "original_module" not in name
    }
    for name in heads[0]:
        expected = (heads[0][name] + heads[1][name]) / 2
        torch.testing.assert_close(found[name], expected)


def test_task_types_that_differ_are_told_and_shown(trained, tmp_path, capsys):
    folders, base = trained("CAUSAL_LM", kinds=("CAUSAL_LM", "TOKEN_CLS"))
    target = merged(folders, tmp_path / "out", "drop")
    assert "task_type: CAUSAL_LM (t0), TOKEN_CLS (t1) differ" in capsys.readouterr().err
    assert "# AutoModelForTokenClassification for 1 of" in (target / "README.md").read_text()
    assert_applied(run_card(target, base)["model"], folders)


def test_a_base_that_the_adapter_does_not_fit_is_no_silent_no_op(trained, tmp_path):
    folders, _ = trained("FEATURE_EXTRACTION")
    target = merged(folders, tmp_path / "out", "drop")
    code = (target / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace('AutoModel.from_pretrained("BASE_MODEL")', "other()")
    code = code.replace('"PATH_TO_THIS_FOLDER"', repr(str(target)))
    with pytest.raises(UserWarning, match="missing adapter keys"), warnings.catch_warnings():
        exec(code, {"other": lambda: fresh("LlamaForCausalLM")})
