"""Kinds that a user's suite brings: choices, chats without labels, heads that PEFT trained."""

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from icm_ray.adapters import load_adapter, open_all
from icm_ray.base_model.loading import Base, load_base
from icm_ray.base_model.low_rank import applied
from icm_ray.base_model.readers import TextReader
from icm_ray.config import ObjectiveSpec
from icm_ray.errors import InputError
from icm_ray.evaluation.adapter_heads import check_heads, head_in
from icm_ray.evaluation.answers import answer_of
from icm_ray.evaluation.corpus import counts_of
from icm_ray.evaluation.experts import ready_experts
from icm_ray.evaluation.fidelity import Asked, fidelity, said_by
from icm_ray.evaluation.heads import Head
from icm_ray.evaluation.metrics import score
from icm_ray.evaluation.scoring import TaskData, predict
from icm_ray.inputs import Pair, Prompt, Turn
from icm_ray.learning.gradients import compare
from icm_ray.learning.objectives import objective_of
from icm_ray.learning.tasks import LearnerData, Readable
from icm_ray.suites.own_scorer import OwnScorer
from icm_ray.suites.tasks import Examples, Task

WORDS = ("sun", "moon", "river", "stone", "bright", "dark")
LLAMA = {"layers.0.self_attn.q_proj": (16, 16), "layers.1.self_attn.v_proj": (8, 16)}


@pytest.fixture(scope="module")
def llama(tiny_llama) -> Base:
    return load_base(tiny_llama)


def examples(texts: list, targets: list[float] | None = None) -> Examples:
    values = np.array(targets or [np.nan] * len(texts), dtype=np.float64)
    return Examples(tuple(texts), values, tuple(map(str, range(len(texts)))))


def chosen() -> tuple[Task, Examples]:
    task = Task("pick", "multiple_choice", "accuracy", (), 64)
    choices = [("sun",), ("moon", "river"), ("stone", "bright dark", "cold")]
    asked = [
        Prompt((Turn("user", f"the {word}"),), choices=("warm", *own))
        for word, own in zip(WORDS, choices * 2, strict=True)
    ]
    return task, examples(asked, [0.0, 1.0, 2.0, 1.0, 0.0, 3.0])


def nats_of(base: Base, prompt: str, answer: str) -> float:
    ids = base.tokenizer(prompt)["input_ids"]
    more = base.tokenizer(answer, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = base.whole(torch.tensor([[*ids, *more]])).logits[0].log_softmax(-1)
    return -sum(float(logits[len(ids) - 1 + i, token]) for i, token in enumerate(more))


def test_the_likeliest_choice_is_the_answer(llama) -> None:
    task, asked = chosen()
    said = answer_of(task).predict(llama, None, asked, task, 4)
    for row, one in enumerate(asked.texts):
        likely = [nats_of(llama, one.turns[0].content, f" {c}") for c in one.choices]
        assert said[row] == np.argmin(likely)


@pytest.mark.parametrize("kind", ["multiple_choice", "generation", "language_modelling"])
def test_an_expert_is_true_to_itself_and_the_base_less(llama, make_adapter, kind) -> None:
    adapter = make_adapter("pick", shapes=LLAMA, spread=0.7)
    task, asked = chosen()
    if kind != "multiple_choice":
        longest = 5 if kind == "generation" else 0
        task = Task("say", kind, "fidelity", (), 64, max_new_tokens=longest)
        asked = examples([f"the {word} of" for word in WORDS])
    item = Asked(task, asked, None, 4)
    with applied(llama.model, adapter):
        theirs = said_by(llama, item)
        own = fidelity(llama, item, theirs)
    base = fidelity(llama, item, theirs)
    judged = Task(task.name, kind, "fidelity", (), 64)
    values = [score(judged, p, asked.targets).value for p in (own, base)]
    assert values[0] == pytest.approx(1)
    assert 0 < values[1] < 0.999


@pytest.mark.parametrize("kind", ["distillation", "entropy", "supervised"])
def test_objectives_read_the_choices(llama, make_adapter, kind) -> None:
    adapter = make_adapter("pick", shapes=LLAMA, spread=0.7)
    task, asked = chosen()
    labels = asked.targets.tolist() if kind == "supervised" else None
    data = LearnerData({"pick": (asked.inputs, 64)}, {"pick": Readable(task, None, labels)})
    (inputs,) = data.batched([adapter], llama.reader, 4)
    objective = objective_of(ObjectiveSpec(kind=kind), llama).of(inputs)
    assert objective is not None
    _, base, expert, energy = compare(llama.model, inputs, objective)
    if kind == "distillation":
        assert energy is not None
        assert (float(base / energy), float(expert)) == (pytest.approx(1), pytest.approx(0))
    else:
        assert float(base) != pytest.approx(float(expert))
        assert float(base) > 0


def test_chats_are_distilled_up_to_the_end_of_a_turn(llama, make_adapter) -> None:
    assert isinstance(llama.reader, TextReader)
    llama.tokenizer.chat_template = (
        "{% for turn in messages %}[CLS] {{ turn.content }} moon {% endfor %}"
    )
    task = Task("chat", "generation", "fidelity", (), 64, max_new_tokens=6)
    asked = tuple(Prompt((Turn("user", f"the {w}"),), True, room=6) for w in WORDS)
    data = LearnerData({"chat": (asked, 64)}, {"chat": Readable(task, None)})
    (inputs,) = data.batched([make_adapter("chat", shapes=LLAMA)], llama.reader, 3)
    assert inputs.end == llama.tokenizer("moon", add_special_tokens=False)["input_ids"][0]
    llama.tokenizer.chat_template = None


def save_classifier(base: Path, folder: Path, outputs: int, **options) -> Tensor:
    """Train nothing, but save a PEFT classifier with its head; return its logits of two pairs."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(1)
        whole = AutoModelForSequenceClassification.from_pretrained(base, num_labels=outputs)
        config = LoraConfig(task_type="SEQ_CLS", r=2, **options)
        model = get_peft_model(whole, config).eval()
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(base)
        pairs = (("the sun", "moon of"), ("the cold", "river"))
        with torch.no_grad():  # one by one: a Llama without a padding token takes no batch
            read = [tokenizer(*pair, return_tensors="pt")["input_ids"] for pair in pairs]
            return torch.cat([model(input_ids=ids).logits for ids in read])


@pytest.mark.parametrize(
    ("model", "targets"), [("tiny_bert", ["query"]), ("tiny_llama", ["q_proj"])]
)
def test_heads_that_peft_trained_read_as_transformers_does(
    model, targets, tmp_path, request
) -> None:
    folder = request.getfixturevalue(model)
    wanted = save_classifier(folder, tmp_path / "pairs", 3, target_modules=targets)
    (expert,) = ready_experts([("pairs", tmp_path / "pairs")]).values()
    head = expert.head()
    assert head is not None
    base = load_base(folder)
    (file,) = open_all([("pairs", tmp_path / "pairs")], run_by="a test")
    task = Task("pairs", "classification", "accuracy", ("a", "b", "c"), 16)
    asked = examples([Pair("the sun", "moon of"), Pair("the cold", "river")], [0.0, 1.0])
    with applied(base.model, file.load()):
        said = predict(base, TaskData(task, asked, head), 2)
    assert said.tolist() == wanted.argmax(-1).tolist()
    if model == "tiny_llama":  # a BERT saved without its pooler has one drawn anew
        check_heads({"pairs": head}, folder)


@pytest.mark.parametrize("bend", ["tanh", "relu"])
def test_heads_are_written_and_read_back(tmp_path, bend) -> None:
    dense = (torch.randn(4, 4), torch.randn(4))
    head = Head(torch.randn(2, 4), torch.randn(2), 1.0, 2.0, "first", dense, bend)
    head.save(tmp_path / "head.safetensors")
    again = Head.load(tmp_path / "head.safetensors")
    x = torch.randn(3, 4)
    assert torch.equal(again.logits(x), head.logits(x))
    assert (again.pooling, again.mean, again.std) == ("first", 1.0, 2.0)
    (tmp_path / "head.safetensors").write_bytes(b"nothing")
    with pytest.raises(InputError, match="no head"):
        Head.load(tmp_path / "head.safetensors")


def test_a_head_that_the_base_reads_otherwise_is_refused(tiny_bert) -> None:
    own = Head(torch.ones(2, 16), torch.zeros(2), pooling="own")
    dense = Head(own.weight, own.bias, pooling="first", dense=(torch.eye(16), torch.zeros(16)))
    with pytest.raises(InputError) as caught:
        check_heads({"a": dense, "b": None}, tiny_bert)
    assert "a: a head of classifier.dense on bert but roberta" in caught.value.problems[0]
    assert "b: no head, and" in caught.value.problems[1]
    check_heads({"a": Head(own.weight, own.bias)}, tiny_bert)


def test_plain_adapters_carry_no_head(tmp_path, make_adapter) -> None:
    from icm_ray.adapters import save_adapter

    save_adapter(make_adapter("plain"), tmp_path / "plain")
    assert head_in(tmp_path / "plain") is None
    assert load_adapter(tmp_path / "plain").saved_modules == {}


def test_scores_are_those_of_torchmetrics() -> None:
    metrics = pytest.importorskip("torchmetrics.functional")
    draw = np.random.default_rng(0)
    classes, said = draw.integers(0, 3, 60), draw.integers(0, 3, 60)
    t, p = torch.from_numpy(classes), torch.from_numpy(said)
    sorts = {"task": "multiclass", "num_classes": 3}
    wanted = {
        "accuracy": metrics.accuracy(p, t, **sorts),
        "macro_f1": metrics.f1_score(p, t, average="macro", **sorts),
    }
    for name, value in wanted.items():
        task = Task("x", "classification", name, ("a", "b", "c"), 8)
        found = score(task, said.astype(float), classes.astype(float))
        assert found.value == pytest.approx(float(value), abs=1e-6)
        assert found.low < found.value < found.high
    numbers = draw.normal(size=60)
    near = numbers + draw.normal(size=60)
    t, p = torch.from_numpy(numbers), torch.from_numpy(near)
    wanted = {
        "r2": metrics.r2_score(p, t),
        "rmse": metrics.mean_squared_error(p, t, squared=False),
    }
    for name, value in wanted.items():
        found = score(Task("x", "regression", name, (), 8), near, numbers)
        assert found.value == pytest.approx(float(value), abs=1e-6)
        assert found.low < found.value < found.high


def test_metrics_of_a_corpus_are_sacrebleus() -> None:
    sacrebleu = pytest.importorskip("sacrebleu")
    said = ["the sun and the moon of the river", "a stone", "bright and cold and dark"]
    wanted = ["the sun or the moon of the river", "the stone", "bright and cold and old"]
    for name, whole in (("bleu", sacrebleu.corpus_bleu), ("chrf", sacrebleu.corpus_chrf)):
        counts = np.array([counts_of(name, s, w) for s, w in zip(said, wanted, strict=True)])
        found = score(Task("x", "generation", name, (), 8), counts, np.zeros(3))
        assert found.value == pytest.approx(whole(said, [wanted]).score / 100)
        assert found.low <= found.value <= found.high


def test_a_scorer_of_one_s_own_sees_classes_and_texts(llama) -> None:
    code = "def mine(said, wanted):\n    return 0.5 + 0.5 * (said == wanted)\n"
    scorer = OwnScorer("judging:mine", code)
    draw = torch.Generator().manual_seed(0)
    asked = examples([f"the {word} of" for word in WORDS], [0.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    head = Head(torch.randn(2, 16, generator=draw), torch.zeros(2))
    plain = Task("kind", "classification", "accuracy", ("dull", "lively"), 64)
    own = replace(plain, metric=scorer.name, scorer=scorer)
    said = predict(llama, TaskData(own, asked, head), 4)
    assert said.tolist() == predict(llama, TaskData(plain, asked, head), 4).tolist()
    right = said == asked.targets
    assert score(own, said, asked.targets).value == pytest.approx((0.5 + right * 0.5).mean())
    assert score(plain, said, asked.targets).value == pytest.approx(right.mean())
    telling = Task("say", "generation", scorer.name, (), 64, max_new_tokens=3, scorer=scorer)
    asked = replace(asked, answers=("no such words",) * len(WORDS))
    found = predict(llama, TaskData(telling, asked, None), 4)
    assert found.tolist() == [0.5] * len(WORDS)
    assert score(telling, found, asked.targets).value == 0.5
