"""An expert trained on another device: head, moments, checkpoints and resume are there too."""

import numpy as np
import pytest
import torch

from icm_ray.base_model.loading import load_base
from icm_ray.base_model.placing import Place
from icm_ray.config import ExpertSet, LoRARecipe, Training
from icm_ray.evaluation.heads import Head
from icm_ray.finetuning.expert import ExpertJob, Lesson
from icm_ray.finetuning.training import train_experts
from icm_ray.finetuning.trajectory import FOLDER, read_trajectory
from icm_ray.suites.tasks import Examples, Task

TASKS = (
    Task("word", "classification", "accuracy", ("odd", "even"), 16, "nowhere", "none"),
    Task("year", "regression", "r2", (), 16, "nowhere", "none"),
    Task("words", "language_modelling", "token_likelihood", (), 16, "nowhere", "none"),
)


class Killed(Exception):
    pass


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_it_is_the_processor_s_and_resumes(
    accelerator, tiny_bert, tiny_llama, texts, tmp_path, task
) -> None:
    training = Training(
        steps=6, batch=4, checkpoints=3, save_every=2, lora_lr=0.02, head_lr=0.02, train_examples=24
    )
    headed = task.kind != "language_modelling"
    targets = ["query", "value"] if headed else ["q_proj", "v_proj"]
    lora = LoRARecipe(rank=2, alpha=4, targets=targets)
    job = ExpertJob(task, lora, training, ExpertSet(init="shared", seed=0), (task.name,))
    examples = Examples(texts, np.array([float(len(t.split()) % 2) for t in texts]), texts)
    start = Head(torch.zeros(task.outputs, 16), torch.zeros(task.outputs)) if headed else None

    def trained(device: str, scratch: str, report=None):
        folder = tmp_path / scratch
        folder.mkdir(exist_ok=True)
        base = load_base(tiny_bert if headed else tiny_llama, Place(device=device))
        return train_experts(base, [Lesson(job, examples, start)], folder, report)[0]

    def kill(step: int, _losses: list[float]) -> None:
        if step == 4:
            raise Killed

    here = trained("cpu", "here")
    with accelerator.on():
        with pytest.raises(Killed):
            trained(accelerator.name, "there", kill)
        there = trained(accelerator.name, "there")
        for name, parameter in there.model.named_parameters():
            assert str(parameter.device) == accelerator.name, name
    assert there.losses == pytest.approx(here.losses, rel=1e-4)
    if headed:
        assert there.head.weight.device.type == "cpu"
        torch.testing.assert_close(there.head.weight, here.head.weight, rtol=1e-4, atol=1e-5)
    one, two = (
        read_trajectory(tmp_path / place / task.name / FOLDER)[0] for place in ("here", "there")
    )
    assert one["step"] == two["step"]
    for row, other in zip(one["adapter"], two["adapter"], strict=True):
        np.testing.assert_allclose(row.values, other.values, rtol=1e-3, atol=1e-4)
