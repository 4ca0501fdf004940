"""A user's own suite through the jobs: chats, choices, texts and pairs, on tiny models."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from base_samples import save_llama
from ray_samples import save_tiny_bert, write_yaml

from icm_ray.config import EvaluateRecipe, FinetuneRecipe, LearnRecipe, MergeRecipe, PipelineRecipe
from icm_ray.config.loading import load_recipe
from icm_ray.errors import ICMRayError, InputError, RecipeError
from icm_ray.files import read_json
from icm_ray.workflows import evaluate, finetune, learn, merge
from icm_ray.workflows.pipeline.run import run

# Said by Ray Data and DeepSpeed of themselves.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
TEMPLATE = (
    "{% for turn in messages %}[CLS]{{ turn.content }}[SEP]{% endfor %}"
    "{% if add_generation_prompt %}[CLS]{% endif %}"
)
OWN_RAY = True  # what is refused starts none
RESOURCES = {"workers": 2, "cpus_per_worker": 0.5}
SHORT = {"optimisation": {"steps": 2, "batch": 4}}
FUSION = {"vae": {"hidden": 8, "latent": 2}, "vae_steps": 3, "meta_steps": 1, "batch": 2}


def word(number: int) -> str:
    letters = "abcdefghijklmnopqrstuvwxyz"
    mixed = "".join(letters[(number * k + k) % 26] for k in (3, 5, 7))
    return letters[number % 26] + letters[number // 26] + mixed


def chat(number: int) -> dict[str, Any]:
    turns = [{"role": "user", "content": word(number)}]
    # Words that a random expert happens on: nothing could be compared with a score of 0.
    return {"talk": [*turns, {"role": "assistant", "content": " ".join(word(number))}]}


ROWS: dict[str, list[dict[str, Any]]] = {
    "chat": [chat(i) for i in range(48)],
    "pick": [{"q": word(i), "choices": ["aa", "b", "ccc"], "answer": i % 3} for i in range(48)],
    "sort": [{"text": word(i), "answer": "ab"[i % 2]} for i in range(48)],
    "talk": [{"ask": word(i + 50)} for i in range(48)],
    "text": [{"text": word(i) + word(i + 9)} for i in range(48)],
}
TASKS: dict[str, dict[str, Any]] = {
    "chat": {"kind": "generation", "messages": "talk", "max_new_tokens": 4, "expert": "chatter"},
    "pick": {"kind": "multiple_choice", "prompt": "{q}"},
    "sort": {"kind": "classification", "classes": ["a", "b"], "head": "names"},
    "talk": {"kind": "generation", "prompt": "{ask}", "chat": True, "max_new_tokens": 4},
    "text": {"kind": "language_modelling"},
}


def write_suite(folder: Path, base: Path, tasks: dict[str, Any], rows: dict[str, Any]) -> Path:
    write_yaml(folder / "suite.yaml", {"base": str(base), "tasks": tasks})
    for name, lines in rows.items():
        text = "\n".join(map(json.dumps, lines))
        (folder / f"{name}.jsonl").write_text(text + "\n", encoding="utf-8")
    return folder


def save_adapter(model: Any, folder: Path, seed: int, **options: Any) -> str:
    """Save a plain PEFT adapter of a model, with all it trains drawn at random."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(model, LoraConfig(r=2, **options))
        torch.manual_seed(seed)
        for name, parameter in peft.named_parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.3 if "lora_" in name else 1.0)
        peft.save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A tiny Llama that reads letters and chats."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tiny-chatting-llama")
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_bert(folder))
    for file in folder.iterdir():
        file.unlink()
    tokenizer.eos_token, tokenizer.chat_template = "[SEP]", TEMPLATE
    tokenizer.save_pretrained(folder)
    save_llama(folder, vocab_size=30, max_position_embeddings=128)
    return folder


@pytest.fixture(scope="module")
def adapters(llama, tmp_path_factory) -> list[dict[str, str]]:
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp("adapters")
    refs = []
    for seed, task in enumerate(TASKS):
        name = TASKS[task].get("expert", task)
        options = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
        model = AutoModelForCausalLM.from_pretrained(llama)
        refs.append({"name": name, "path": save_adapter(model, root / name, seed, **options)})
    return refs


@pytest.fixture
def suite(llama, tmp_path) -> Path:
    return write_suite(tmp_path / "suite", llama, TASKS, ROWS)


def recipe_of(kind: Any, folder: Path, **keys: Any) -> Any:
    plain = {"resources": RESOURCES, "output": str(folder / "out"), **keys}
    apart = json.loads(json.dumps(plain))  # what two rows share would be written as an alias
    return load_recipe(kind, write_yaml(folder / "recipe.yaml", apart))


def row(method: str, **keys: Any) -> dict[str, Any]:
    return {"method": method, **keys}


METHODS = [
    row("soup"),
    row("task_arithmetic", grid={"scale": [0.3, 0.6]}),
    row("regmean"),
    *(row(m, learn=SHORT) for m in ("distillation", "task_vector_match", "nsc")),
    row("adamerging", learn=SHORT, tasks=["pick", "sort"]),
    row("atlas", learn=SHORT, tasks=["chat", "pick", "sort", "text"]),
    row("icm_fusion", fusion=FUSION, in_context="direct", learn=SHORT),
]


@pytest.mark.slow
def test_the_pipeline_proves_every_method_on_it(suite, adapters, tmp_path, capsys) -> None:
    recipe = recipe_of(
        PipelineRecipe,
        tmp_path,
        name="mine",
        suite=str(suite),
        adapters=adapters,
        methods=METHODS,
    )
    scores = run(recipe, tmp_path / "out")["scores"]
    for one in METHODS:
        assert scores[f"adapters/{one['method']}"]["mean"] is not None
    assert scores["adapters/expert"] == {"mean": 1.0, "worst": 1.0}
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()
    assert "rows are longer" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "loss",
    [
        pytest.param("task", marks=pytest.mark.slow),
        *(
            pytest.param(loss, marks=pytest.mark.long)
            for loss in ("reconstruction", "entropy", "null_space_ratio")
        ),
    ],
)
def test_every_inner_loss_runs_on_it(suite, adapters, tmp_path, loss) -> None:
    fused = row("icm_fusion", fusion={**FUSION, "inner": {"loss": loss}})
    some = [ref for ref in adapters if ref["name"] in ("pick", "sort")]
    recipe = recipe_of(
        PipelineRecipe,
        tmp_path,
        name="mine",
        suite=str(suite),
        tasks=["pick", "sort"],
        adapters=some,
        methods=[fused],
    )
    assert run(recipe, tmp_path / "out")["scores"]["adapters/icm_fusion"]["mean"] is not None


@pytest.mark.slow
def test_what_was_learned_by_one_method_is_not_merged_as_another(
    suite, adapters, llama, tmp_path
) -> None:
    data = {"suite": str(suite), "split": "calibration"}
    given = {"base": str(llama), "adapters": adapters, "data": data}
    recipe = recipe_of(LearnRecipe, tmp_path, method="nsc", learn=SHORT, **given)
    learn.run(recipe, tmp_path / "out")
    order = {"adapters": adapters, "evidence": str(tmp_path / "out")}
    order |= {"output": {"path": str(tmp_path / "merged")}}
    with pytest.raises(InputError, match="learned with 'nsc' but method is 'distillation'"):
        merge.run(recipe_of(MergeRecipe, tmp_path, method="distillation", **order), tmp_path / "m")
    merge.run(recipe_of(MergeRecipe, tmp_path, method="nsc", **order), tmp_path / "m")


@pytest.mark.slow
def test_experts_of_it_are_trained_and_scored(suite, tmp_path) -> None:
    recipe = recipe_of(
        FinetuneRecipe,
        tmp_path,
        suite=str(suite),
        tasks=["chat", "pick", "sort", "text"],
        lora={"rank": 2, "targets": ["q_proj", "v_proj"]},
        training={"steps": 4, "batch": 8, "checkpoints": 2},
    )
    scores = finetune.run(recipe, tmp_path / "out")["scores"]
    assert scores["shared-seed0/expert"]["worst"] == 1.0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*drawn at random:UserWarning")  # the base is saved bare
def test_pairs_are_scored_through_the_heads_that_peft_saved(tiny_bert, tmp_path) -> None:
    from transformers import AutoModel, AutoModelForSequenceClassification

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        AutoModel.from_pretrained(tiny_bert).save_pretrained(tmp_path / "base")
        for file in tiny_bert.glob("token*"):
            (tmp_path / "base" / file.name).write_bytes(file.read_bytes())
    refs, tasks, rows = [], {}, {}
    for seed, name in enumerate(("same", "near")):
        outputs = 2 if name == "same" else 1
        model = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "base", num_labels=outputs
        )
        options = {"task_type": "SEQ_CLS", "target_modules": ["query", "value"]}
        refs.append({"name": name, "path": save_adapter(model, tmp_path / name, seed, **options)})
        values = [i % 2 if name == "same" else i / 7 for i in range(40)]
        rows[name] = [
            {"text": word(i), "text_pair": word(i + 5), "answer": v} for i, v in enumerate(values)
        ]
    tasks["same"] = {"kind": "classification", "metric": "macro_f1"}
    tasks["near"] = {"kind": "regression", "metric": "rmse"}
    suite = write_suite(tmp_path / "suite", tmp_path / "base", tasks, rows)
    methods = [row("soup"), row("distillation", learn=SHORT)]
    recipe = recipe_of(
        PipelineRecipe, tmp_path, name="pairs", suite=str(suite), adapters=refs, methods=methods
    )
    scores = run(recipe, tmp_path / "out")["scores"]
    assert scores["adapters/expert"] == {"mean": 1.0, "worst": 1.0}
    kept = tmp_path / "out" / "adapter" / "saved_modules"
    assert sorted(path.stem for path in kept.iterdir()) == ["near", "same"]
    order = recipe_of(
        EvaluateRecipe,
        tmp_path,
        suite=str(suite),
        experts=refs,
        adapters=[{"name": "merged", "path": str(tmp_path / "out" / "adapter")}],
    )
    found = evaluate.run(order, tmp_path / "scores")["scores"]["merged"]
    assert found["normalised"].keys() == {"near", "same"}


def refused(recipe: Any, target: Path) -> str:
    with pytest.raises(ICMRayError) as caught:
        run(recipe, target)
    assert isinstance(caught.value, RecipeError | InputError)
    return "\n".join(caught.value.problems)


def test_each_wrong_thing_is_said_before_ray_starts(suite, adapters, tmp_path) -> None:
    given = {"name": "mine", "suite": str(suite), "adapters": adapters}
    atlas = recipe_of(PipelineRecipe, tmp_path, methods=[row("atlas")], **given)
    assert "methods.atlas: reads labels, but talk has no answers" in refused(atlas, tmp_path / "o")
    plain = {**given, "methods": [row("soup")]}
    large = recipe_of(PipelineRecipe, tmp_path, sizes={"test": 99}, **plain)
    assert "chat/test: 99 examples are wanted but 14 are there" in refused(large, tmp_path / "o")
    few = {**given, "methods": [row("soup")], "adapters": [{"name": "x", "path": "y"}]}
    assert "none is called as a task" in refused(
        recipe_of(PipelineRecipe, tmp_path, **few), tmp_path / "o"
    )
    train = recipe_of(FinetuneRecipe, tmp_path, suite=str(suite))
    assert "talk: no answers but experts are trained on some" in refused_training(train, tmp_path)
    assert not (tmp_path / "o").exists()


def refused_training(recipe: FinetuneRecipe, folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        finetune.run(recipe, folder / "o")
    return "\n".join(caught.value.problems)


def test_rows_that_are_cut_are_counted(suite, llama) -> None:
    from icm_ray.suites import find_suite
    from icm_ray.workflows.prepared import cut_lines

    assert cut_lines(find_suite(str(suite)), llama) == []
    tasks = {**TASKS, "text": {**TASKS["text"], "max_tokens": 5}}
    write_suite(suite, llama, tasks, ROWS)
    assert cut_lines(find_suite(str(suite)), llama) == [
        "text: 48 of 48 rows are longer than 5 tokens and cut."
    ]
    assert read_json(llama / "config.json")["max_position_embeddings"] == 128
