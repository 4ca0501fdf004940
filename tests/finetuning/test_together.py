"""Several experts trained in the same forward passes: as alone, and resumable as one."""

from pathlib import Path

import numpy as np
import pytest
import torch

from icm_ray.base_model.loading import load_base
from icm_ray.config import ExpertSet, LoRARecipe, Training
from icm_ray.errors import RecipeError
from icm_ray.evaluation.heads import Head
from icm_ray.files import sha256_of_file
from icm_ray.finetuning import routing
from icm_ray.finetuning.expert import ExpertJob, Lesson, TrainedExpert
from icm_ray.finetuning.training import train_experts
from icm_ray.inputs import Prompt, Turn
from icm_ray.suites.tasks import Examples, Task

WORD = Task("word", "classification", "accuracy", ("odd", "even"), 16)
YEAR = Task("year", "regression", "r2", (), 6)
NOVEL = Task("novel", "language_modelling", "token_likelihood", (), 16)
REPLY = Task("reply", "generation", "exact_match", (), 16, max_new_tokens=5)
PICK = Task("pick", "multiple_choice", "accuracy", (), 16)


def lesson(task: Task, texts: tuple[str, ...], **training) -> Lesson:
    """Return twenty-four examples of a task; a head starts from zero."""
    values = {"steps": 8, "batch": 6, "checkpoints": 3, "save_every": 3, "lora_lr": 0.02}
    targets = ["query", "value"] if task.headed else ["q_proj", "v_proj"]
    lora = LoRARecipe(rank=2, alpha=4, targets=targets)
    job = ExpertJob(task, lora, Training(**{**values, **training}), ExpertSet(init="own"), ())
    known = np.array([float(len(text.split()) % 2) for text in texts])
    answers = texts[::-1] if task.kind == "generation" else ()
    asked = texts
    if task.kind == "multiple_choice":
        asked = tuple(Prompt((Turn("user", text),), choices=("sun", "cold moon")) for text in texts)
    head = None
    if task.headed:
        scale = (0.0, 1.0) if task.classes else (0.5, 2.0)
        head = Head(torch.zeros(task.outputs, 16), torch.zeros(task.outputs), *scale)
    return Lesson(job, Examples(asked, known, texts, answers), head)


def leaves(expert: TrainedExpert) -> dict[str, torch.Tensor]:
    """Return all that was trained, under names that do not depend on who else was."""
    named = {
        ".".join(part for part in parts if part != expert.name): leaf.detach()
        for path, leaf in expert.model.named_parameters()
        if expert.name in (parts := path.split("."))
    }
    head = {} if expert.head is None else {"weight": expert.head.weight, "bias": expert.head.bias}
    return {**named, **head}


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): sha256_of_file(path)
        for path in sorted(folder.rglob("*.parquet"))
    }


@pytest.fixture
def train(tiny_bert: Path, tiny_llama: Path, tmp_path: Path):
    """Return a function that trains on a fresh base: (lessons, folder of state, report)."""

    def call(lessons, scratch: str, report=None, device: str = "cpu") -> list[TrainedExpert]:
        folder = tmp_path / scratch
        folder.mkdir(exist_ok=True)
        headed = lessons[0].job.task.headed
        return train_experts(
            load_base(tiny_bert if headed else tiny_llama), lessons, folder, report
        )

    return call


@pytest.mark.parametrize("most_padding", [1.0, 9.0], ids=["own widths", "all in one pass"])
@pytest.mark.parametrize("tasks", [(WORD, YEAR), (NOVEL, REPLY, PICK)], ids=["heads", "words"])
def test_each_expert_is_the_one_trained_alone(
    train, texts, monkeypatch, tasks: tuple[Task, ...], most_padding: float
) -> None:
    monkeypatch.setattr(routing, "MOST_PADDING", most_padding)
    lessons = [lesson(task, texts, steps=20) for task in tasks]
    together = train(lessons, "together")
    for own, expert in zip(lessons, together, strict=True):
        (alone,) = train([own], own.job.task.name)
        assert expert.losses == pytest.approx(alone.losses, rel=1e-4)
        found, expected = leaves(expert), leaves(alone)
        assert found.keys() == expected.keys()
        for name, leaf in expected.items():
            torch.testing.assert_close(found[name], leaf, rtol=1e-3, atol=1e-4)
    one, other = (leaves(expert) for expert in together[:2])
    assert not any(torch.equal(one[name], other[name]) for name in one if "lora_" in name)


@pytest.mark.parametrize("killed_after", [1, 3, 5, 8])
def test_a_killed_group_ends_in_the_same_bytes(train, texts, tmp_path, killed_after: int) -> None:
    lessons = [lesson(WORD, texts), lesson(YEAR, texts)]
    whole = train(lessons, "whole")

    def kill(step: int, _losses: list[float]) -> None:
        if step == killed_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(lessons, "killed", kill)
    steps: list[int] = []
    resumed = train(lessons, "killed", lambda step, _losses: steps.append(step))
    assert steps == list(range(killed_after // 3 * 3 + 1, 9)), "only what was lost is repeated"
    for one, other in zip(whole, resumed, strict=True):
        assert one.losses == other.losses
        assert all(torch.equal(leaves(one)[name], leaf) for name, leaf in leaves(other).items())
    kept = files(tmp_path / "killed")
    assert kept == files(tmp_path / "whole")
    assert {Path(name).parts[0] for name in kept} == {"word", "year"}


def test_a_loss_that_is_no_number_names_its_task(train, texts) -> None:
    broken = lesson(YEAR, texts)
    broken.train.targets[:] = np.nan
    with pytest.raises(RecipeError, match=r"the loss of year is no number at step 0"):
        train([lesson(WORD, texts), broken], "lost")


def test_saved_adapters_are_each_their_own(train, texts, tmp_path: Path) -> None:
    from icm_ray.adapters import load_adapter

    experts = train([lesson(WORD, texts), lesson(YEAR, texts)], "scratch")
    for number, expert in enumerate(experts):
        folder = tmp_path / f"adapter{number}"
        expert.save_adapter(folder, torch.float32, "tiny")
        stored, trained = load_adapter(folder, "it"), leaves(expert)
        assert len(stored.modules) == 4
        for module, factors in stored.modules.items():
            assert torch.equal(factors.a, trained[f"base_model.model.{module}.lora_A.weight"])


def test_a_group_trains_on_another_device(train, texts, accelerator) -> None:
    lessons = [lesson(WORD, texts), lesson(YEAR, texts)]
    here = train(lessons, "here")
    with accelerator.on():
        there = train(lessons, "there", device=accelerator.name)
    for one, other in zip(here, there, strict=True):
        assert other.losses == pytest.approx(one.losses, rel=1e-4)
        torch.testing.assert_close(other.head.weight, one.head.weight, rtol=1e-4, atol=1e-5)
