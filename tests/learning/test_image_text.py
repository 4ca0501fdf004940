"""Prompts with images through evidence, a step of every kind of objective, scores and training."""

import io
from base64 import b64encode
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from icm_ray.base_model.loading import Base, load_base
from icm_ray.base_model.low_rank import applied
from icm_ray.base_model.readers import batches_of
from icm_ray.base_model.states import features
from icm_ray.config import (
    ExpertSet,
    LoRARecipe,
    ObjectiveSpec,
    OptimisationSpec,
    Training,
)
from icm_ray.evaluation.answers import answer_of, head_features
from icm_ray.evaluation.fidelity import Asked, fidelity, said_by
from icm_ray.evaluation.scoring import TaskData, evaluate, values
from icm_ray.evidence.gather import gather
from icm_ray.evidence.grams import gather_grams
from icm_ray.finetuning.expert import ExpertJob, Lesson
from icm_ray.finetuning.training import train_experts
from icm_ray.inputs import PLACE, Prompt, Turn
from icm_ray.learning.gradients import Learning
from icm_ray.learning.learner import learn
from icm_ray.learning.objectives import objective_of
from icm_ray.learning.parameters import Coefficients
from icm_ray.learning.tasks import LearnerData, Readable
from icm_ray.learning.terms import own_terms
from icm_ray.suites.tasks import Examples, Task
from icm_ray.types import Adapter

WORDS = ("sun", "moon", "river", "stone", "bright", "dark")
PATHS = {
    "model.language_model.layers.0.self_attn.q_proj": (16, 16),
    "model.language_model.layers.1.self_attn.o_proj": (16, 16),
    "model.vision_tower.encoder.layer.1.attention.v_proj": (8, 8),
    "model.multi_modal_projector.linear_2": (16, 16),
}
DRAW = np.random.default_rng(0)
KINDS = {
    "say": Task("say", "generation", "exact_match", (), 64, max_new_tokens=3),
    "pick": Task("pick", "multiple_choice", "accuracy", (), 64),
    "read": Task("read", "language_modelling", "token_likelihood", (), 64),
    "name": Task("name", "classification", "accuracy", ("sun", "moon"), 64, head="names"),
}


def image() -> str:
    file = io.BytesIO()
    Image.fromarray(DRAW.integers(0, 256, (30, 30, 3), dtype=np.uint8)).save(file, "PNG")
    return b64encode(file.getvalue()).decode()


IMAGES = [image() for _ in WORDS]


def examples(task: Task, images: list[str] = IMAGES) -> Examples:
    """Rows of a task; the last one shows no image and the one before two."""
    texts = []
    for number, word in enumerate(WORDS):
        own = (*images[number : number + 1], *images[:1])[: 1 + (number == 4)] * (number != 5)
        turns = (Turn("user", f"{PLACE * len(own)} the {word}"),)
        said = "bright cold" if task.kind == "language_modelling" else None
        choices = () if task.kind in ("language_modelling", "generation") else ("sun", "moon")
        texts.append(Prompt(turns, False, said, choices, task.max_new_tokens, own))
    targets = np.arange(6.0) % 2 if task.chooses else np.full(6, np.nan)
    answers = WORDS if task.kind == "generation" else ()
    return Examples(tuple(texts), targets, WORDS, answers)


@pytest.fixture(scope="module")
def base(tiny_llava) -> Base:
    return load_base(tiny_llava)


@pytest.fixture(scope="module")
def adapters(make_adapter) -> list[Adapter]:
    return [make_adapter(name, shapes=PATHS, spread=0.4) for name in sorted(KINDS)]


def test_evidence_of_images_is_that_of_each_example_alone(base, adapters) -> None:
    inputs = examples(KINDS["say"]).inputs
    together, alone = (batches_of(base.reader, inputs, 64, size) for size in (4, 1))
    many, one = (gather(base.model, adapters[0], batches) for batches in (together, alone))
    torch.testing.assert_close(many.task_vector, one.task_vector)
    assert many.expert_ratios.keys() == PATHS.keys()
    for path, ratio in one.expert_ratios.items():
        assert many.expert_ratios[path] == pytest.approx(ratio, rel=1e-4)
    grams = [gather_grams(base.model, adapters[0], list(PATHS), b) for b in (together, alone)]
    for path, gram in grams[0].grams.items():
        other = grams[1].grams[path].square()
        torch.testing.assert_close(gram.square(), other, rtol=1e-4, atol=1e-5)
    blank = examples(KINDS["say"], [IMAGES[0]] * 6).inputs
    others = features(base.model, batches_of(base.reader, blank, 64, 4))
    assert not torch.allclose(others, features(base.model, together)), "images are seen"


OBJECTIVES = {
    "nsc": ObjectiveSpec(kind="null_space_ratio"),
    "rows": ObjectiveSpec(kind="row_space_match"),
    "task_vector": ObjectiveSpec(kind="task_vector_match"),
    "distillation": ObjectiveSpec(kind="distillation"),
    "supervised": ObjectiveSpec(kind="supervised"),
}


@pytest.mark.parametrize("spec", OBJECTIVES.values(), ids=OBJECTIVES)
def test_a_step_of_all_tasks_at_once_is_that_of_each_alone(base, adapters, spec) -> None:
    rows = {name: examples(task) for name, task in KINDS.items()}
    labels = {
        name: own.labels if KINDS[name].kind != "language_modelling" else None
        for name, own in rows.items()
    }
    known = {name: Readable(task, None, labels[name]) for name, task in KINDS.items()}
    data = LearnerData({name: (own.inputs, 64) for name, own in rows.items()}, known)
    histories = []
    for size in (1, 4):
        tasks = data.seen_by(spec).batched(adapters, base.reader, 3)
        how = OptimisationSpec(steps=2, lr=1e-2, tasks_per_forward=size)
        parameters = Coefficients(own_terms(adapters), 0.4)
        learned = learn(base.model, Learning(parameters, objective_of(spec, base), how), tasks)
        histories.append(learned.report["history"])
    for name in KINDS:
        assert histories[0][name] == pytest.approx(histories[1][name], rel=1e-3)
        assert histories[0][name][0] != pytest.approx(histories[0][name][1], rel=1e-6)


@pytest.mark.parametrize("task", KINDS.values(), ids=KINDS)
def test_an_expert_is_trained_and_scored_and_true_to_itself(base, task, tmp_path: Path) -> None:
    fresh = load_base(base.path)
    own = examples(task)
    lora = LoRARecipe(rank=2, alpha=4, targets=r".*language_model.*\.(q|v)_proj")
    training = Training(steps=40, batch=4, lora_lr=0.05, checkpoints=2)
    job = ExpertJob(task, lora, training, ExpertSet(init="shared", seed=0), ())
    (trained,) = train_experts(fresh, [Lesson(job, own, None)], tmp_path)
    assert np.mean(trained.losses[-5:]) < np.mean(trained.losses[:5])
    adapted = {n.split(".lora_")[0] for n, _ in trained.model.named_parameters() if "lora_" in n}
    assert len(adapted) == 4
    assert all("language_model" in name for name in adapted)
    before = values(evaluate(base, None, {task.name: TaskData(task, own, None)}, batch=4))
    after = values(evaluate(fresh, None, {task.name: TaskData(task, own, None)}, batch=4))
    assert after[task.name] > before[task.name]
    asked = Asked(task, own, None, 4)
    theirs = said_by(fresh, asked)
    shares = [fidelity(one, asked, theirs) for one in (fresh, base)]
    total = [s.sum(0)[0] / s.sum(0)[1] if s.ndim == 2 else s.mean() for s in shares]
    assert total[0] == pytest.approx(1, abs=1e-5)
    assert total[1] < 0.999


def test_a_head_reads_images_and_words(base) -> None:
    task, own = Task("sort", "classification", "accuracy", ("a", "b"), 64), examples(KINDS["say"])
    many, one = (head_features(base, own, task, size) for size in (4, 1))
    assert many.shape == (6, base.d_model)
    torch.testing.assert_close(many, one)


def test_choices_are_those_of_each_prompt_alone(base, adapters) -> None:
    task, own = KINDS["pick"], examples(KINDS["pick"])
    with applied(base.model, adapters[1]):
        together, alone = (
            answer_of(task).predict(base, None, own, task, size).tolist() for size in (4, 1)
        )
    assert together == alone
    assert len(set(together)) == 2
