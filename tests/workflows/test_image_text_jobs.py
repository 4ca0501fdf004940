"""Images beside texts through the jobs, from ready adapters to the report, on a tiny LLaVA."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from base_samples import save_llama, save_llava
from PIL import Image
from ray_samples import save_tiny_bert, write_yaml

from icm_ray.config import EvaluateRecipe, FinetuneRecipe, PipelineRecipe, PrepareRecipe
from icm_ray.config.loading import load_recipe
from icm_ray.errors import ICMRayError
from icm_ray.workflows import evaluate, finetune, prepare
from icm_ray.workflows.pipeline.run import run

# Said by Ray Data of itself.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
OWN_RAY = True  # what is refused starts none
RESOURCES = {"workers": 2, "cpus_per_worker": 0.5}
SHORT = {"optimisation": {"steps": 2, "batch": 4}}
COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200)}
TASKS: dict[str, dict[str, Any]] = {
    "colour": {"kind": "generation", "prompt": "{picture} colour?", "max_new_tokens": 4},
    "pick": {"kind": "multiple_choice", "prompt": "{picture} which?", "chat": True},
    "same": {"kind": "classification", "prompt": "{ask}", "image": None, "classes": ["a", "b"]},
    "talk": {"kind": "language_modelling", "image": None, "messages": "talk"},
}


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Path:
    """A tiny LLaVA that reads letters."""
    from transformers import AutoTokenizer

    letters = save_tiny_bert(tmp_path_factory.mktemp("letters"))
    tokenizer = AutoTokenizer.from_pretrained(letters)
    tokenizer.eos_token = "[SEP]"
    folder = tmp_path_factory.mktemp("tiny-llava")
    save_llava(folder, tokenizer, max_position_embeddings=128)
    return folder


@pytest.fixture
def suite(llava, tmp_path) -> Path:
    """Four tasks: three that show images, one of words alone."""
    folder = tmp_path / "suite"
    folder.mkdir()
    rows: dict[str, list[Any]] = {name: [] for name in TASKS}
    for number in range(48):
        word, shade = list(COLOURS.items())[number % 2]
        file = f"{number}.png"
        Image.new("RGB", (20, 30), tuple(c + number for c in shade)).save(folder / file)
        rows["colour"].append({"picture": file, "answer": word})
        rows["pick"].append({"picture": file, "choices": [*COLOURS], "answer": word})
        asked = chr(97 + number % 26) + chr(97 + number // 26)
        rows["same"].append({"ask": asked, "answer": number % 2})
        parts = [{"type": "image", "path": file}, {"type": "text", "text": "see"}]
        turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": word}]
        rows["talk"].append({"talk": turns})
    tasks = {
        name: {key: value for key, value in {"image": "picture", **task}.items() if value}
        for name, task in TASKS.items()
    }
    tasks["same"]["head"] = "names"
    write_yaml(folder / "suite.yaml", {"base": str(llava), "tasks": tasks})
    for name, lines in rows.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def adapters(llava, tmp_path_factory) -> list[dict[str, str]]:
    """Plain PEFT adapters of the language model; one changes the projector too."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForImageTextToText

    root, refs = tmp_path_factory.mktemp("adapters"), []
    for seed, name in enumerate(TASKS):
        targets = r".*language_model.*\.(q|v)_proj" + (r"|.*linear_1" if name == "talk" else "")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForImageTextToText.from_pretrained(llava)
            config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=targets)
            peft = get_peft_model(model, config)
            torch.manual_seed(seed)
            for parameter in peft.parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.3)
            peft.save_pretrained(root / name, save_embedding_layers=False)
        refs.append({"name": name, "path": str(root / name)})
    return refs


def recipe_of(kind: Any, folder: Path, **keys: Any) -> Any:
    plain = {"resources": RESOURCES, "output": str(folder / "out"), **keys}
    apart = json.loads(json.dumps(plain))
    return load_recipe(kind, write_yaml(folder / "recipe.yaml", apart))


@pytest.mark.slow
def test_every_kind_of_method_is_proven_on_it(suite, adapters, tmp_path) -> None:
    learned = ("distillation", "nsc")
    methods = [{"method": "soup"}, {"method": "regmean"}]
    methods += [{"method": name, "learn": SHORT} for name in learned]
    given = {"name": "seen", "suite": str(suite), "adapters": adapters, "methods": methods}
    scores = run(recipe_of(PipelineRecipe, tmp_path, **given), tmp_path / "out")["scores"]
    for row in methods:
        assert scores[f"adapters/{row['method']}"]["mean"] is not None
    assert scores["adapters/expert"] == {"mean": 1.0, "worst": 1.0}
    order = {"suite": str(suite), "experts": adapters}
    order["adapters"] = [{"name": "merged", "path": str(tmp_path / "out" / "adapter")}]
    found = evaluate.run(recipe_of(EvaluateRecipe, tmp_path, **order), tmp_path / "scores")
    assert found["scores"]["merged"]["score"].keys() == TASKS.keys()


@pytest.mark.slow
def test_experts_of_it_are_trained(suite, tmp_path) -> None:
    recipe = recipe_of(
        FinetuneRecipe,
        tmp_path,
        suite=str(suite),
        lora={"rank": 2, "targets": r".*language_model.*\.(q|v)_proj"},
        training={"steps": 6, "batch": 8, "checkpoints": 2, "lora_lr": 0.05},
    )
    scores = finetune.run(recipe, tmp_path / "out")["scores"]
    assert scores["shared-seed0/expert"]["worst"] == 1.0


def refused(call: Any, *given: Any) -> str:
    with pytest.raises(ICMRayError) as caught:
        call(*given)
    return "\n".join(caught.value.problems)


def test_each_wrong_thing_is_said_before_ray_starts(suite, llava, tmp_path) -> None:
    words = tmp_path / "words"
    save_llama(words, vocab_size=32)
    for file in llava.glob("token*"):
        (words / file.name).write_bytes(file.read_bytes())
    look = recipe_of(PrepareRecipe, tmp_path, suite=str(suite), base=str(words))
    told = refused(prepare.run, look, tmp_path / "o")
    for task in ("colour", "pick", "talk"):
        assert f"{task}: data: images beside texts but the base has no vision tower" in told
    assert "same" not in told
    given = {"name": "mine", "suite": str(suite), "methods": [{"method": "soup"}]}
    refs = [
        {"name": name, "path": str(save_plain(words, tmp_path / name))} for name in ("pick", "talk")
    ]
    plain = recipe_of(PipelineRecipe, tmp_path, adapters=refs, **given)
    told = refused(run, plain, tmp_path / "o")
    for name in ("pick", "talk"):
        assert f"{name}: model.layers.0.self_attn.q_proj" in told
        assert "not in the base model" in told


def save_plain(base: Path, folder: Path) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"])
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(folder, save_embedding_layers=False)
    return folder
