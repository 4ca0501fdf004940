"""Train experts on one frozen base, one or several in each forward pass: resumable, repeatable."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from icm_ray.adapters import AdapterFile
from icm_ray.adapters.contents import PREFIX
from icm_ray.base_model.loading import Base
from icm_ray.base_model.readers import Batch
from icm_ray.base_model.states import States, states_of
from icm_ray.checkpoint import Checkpoint, all_finite
from icm_ray.config import LoRARecipe, Training
from icm_ray.errors import RecipeError
from icm_ray.evaluation.answers import answer_of
from icm_ray.evaluation.heads import Head
from icm_ray.finetuning.expert import ExpertJob, Lesson, TrainedExpert, batch_rows
from icm_ray.finetuning.routing import passes, routed
from icm_ray.finetuning.trajectory import A, B, Trajectory
from icm_ray.seeding import seed_for

STATE = "state.safetensors"

Report = Callable[[int, list[float]], None]
"""Called after each step with the step's number and the loss of each expert."""


def train_experts(
    base: Base, lessons: Sequence[Lesson], scratch: Path, report: Report | None = None
) -> list[TrainedExpert]:
    """Train adapters and heads together, each on examples of its own task.

    A head starts as the linear probe of the frozen base (arXiv 2202.10054: features are bent
    less that way), and both learning rates fall linearly to zero. Dropout is off and every draw
    is keyed by (seed, task, step): a run that was killed continues from its last state in
    `scratch` to the same bytes as an unbroken one.

    Several experts share each pass through the base and nothing else: losses are added, so every
    expert has the gradient and the steps that it has alone. Batches are padded to the longest,
    so numbers are summed in another order: experts agree with those trained alone as float32
    does, not to the bit.

    Args:
        base: Frozen base; its weights stay untouched.
        lessons: Experts of one set, alike in all but their tasks.
        scratch: Folder for resumable state and trajectories (`<task>/`); kept until the caller
            is done.
        report: Told about each step.

    Raises:
        RecipeError: a loss, or a weight in the end, is no number, or a target module is none
            that several experts can share.
    """
    model = _with_adapters(base, [lesson.job for lesson in lessons])
    learners = [
        _Learner(base, lesson, model, name, scratch)
        for name, lesson in zip(model.peft_config, lessons, strict=True)
    ]
    training = lessons[0].job.training
    optimizer = _optimizer(learners, training)
    leaves = {name: leaf for learner in learners for name, leaf in learner.leaves.items()}
    checkpoint = Checkpoint(scratch / STATE)  # the folder's name has the run's key
    history: list[list[float]] = checkpoint.load(leaves, optimizer)
    if not history:
        for learner in learners:
            learner.trajectory.offer(0, math.nan, learner.adapter)
    for step in range(len(history), training.steps):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * (1 - step / training.steps)
        losses = _losses(base, model, learners, step)
        optimizer.zero_grad()
        torch.autograd.backward(losses)
        optimizer.step()
        history.append([float(loss.detach()) for loss in losses])
        for learner, loss in zip(learners, history[-1], strict=True):
            learner.trajectory.offer(step + 1, loss, learner.adapter)
        if (step + 1) % training.save_every == 0:
            checkpoint.save(leaves, optimizer, history)
        if report:
            report(step + 1, history[-1])
    for learner in learners:
        _refuse_lost(learner.job, training.steps, all_finite(learner.leaves))
    columns = [list(column) for column in zip(*history, strict=True)]
    return [learner.trained(own) for learner, own in zip(learners, columns, strict=True)]


def _optimizer(learners: Sequence["_Learner"], training: Training) -> torch.optim.AdamW:
    adapters = [leaf for learner in learners for leaf in learner.adapter.values()]
    heads = [leaf for learner in learners for leaf in learner.head_leaves.values()]
    groups = [
        {"params": adapters, "rate": training.lora_lr},
        {"params": heads, "rate": training.head_lr},
    ]
    return torch.optim.AdamW(groups, weight_decay=0.0)


def _losses(base: Base, model: Any, learners: Sequence["_Learner"], step: int) -> list[Tensor]:
    """Return each expert's loss on its batch of a step, of as few passes as there can be."""
    known = {learner.name: learner for learner in learners}
    batches = {name: learner.batch(step) for name, learner in known.items()}
    losses = {}
    for group in passes(batches):
        # The adapter's layers are inside the base's own modules by now.
        with routed(model, list(group), sum(len(batch.rows) for batch in group.values())):
            passed = states_of(base.model, list(group.values()))
            for name, states in zip(group, passed, strict=True):
                losses[name] = known[name].loss(base, states)
                _refuse_lost(known[name].job, step, bool(losses[name].isfinite()))
    return [losses[name] for name in known]


def _refuse_lost(job: ExpertJob, step: int, is_number: bool) -> None:
    """Stop before a step that could only spoil what the last ones have made."""
    if not is_number:
        raise RecipeError(
            f"training: the loss of {job.task.name} is no number at step {step}. Lower "
            "training.lora_lr and training.head_lr."
        )


class _Learner:
    """One expert while it is trained: its adapter in the model, its head and its batches."""

    def __init__(self, base: Base, lesson: Lesson, model: Any, name: str, scratch: Path) -> None:
        self.job, self.model, self.name = lesson.job, model, name
        task, start = self.job.task, lesson.start
        self.answer, self.examples = answer_of(task), len(lesson.train)
        self.scale = (start.mean, start.std) if start else (0.0, 1.0)
        self.targets = torch.from_numpy((lesson.train.targets - self.scale[0]) / self.scale[1])
        self.make_batch = self.answer.batches(base, lesson.train, task)
        self.head = None if start is None else _head(start, next(base.model.parameters()).device)
        self.head_leaves = dict(self.head.named_parameters()) if self.head is not None else {}
        # The names PEFT writes to disk lack the name of the adapter inside the model.
        self.adapter = {
            path.replace(f".{name}", ""): leaf
            for path, leaf in model.named_parameters()
            if name in path.split(".")
        }
        if lesson.adapter is not None:
            _go_on_from(lesson.adapter, self.adapter, self.job.lora)
        training = self.job.training
        self.trajectory = Trajectory(
            scratch / task.name,
            training.steps,
            training.checkpoints,
            whole=training.trajectory == "whole",
        )

    @property
    def leaves(self) -> dict[str, nn.Parameter]:
        """All that is trained, by names that no other expert's have."""
        named = {**self.adapter, **{f"head.{n}": leaf for n, leaf in self.head_leaves.items()}}
        return {f"{self.job.task.name}/{name}": leaf for name, leaf in named.items()}

    def batch(self, step: int) -> Batch:
        """Return its inputs of a step."""
        return self.make_batch(batch_rows(self.job, self.examples, step))

    def loss(self, base: Base, states: States) -> Tensor:
        """Return the mean loss of a batch from its states."""
        targets = self.targets[states.batch.rows]
        return self.answer.loss(base, self.head, states, targets, self.job.task)

    def trained(self, losses: list[float]) -> TrainedExpert:
        """Return it as it is now."""
        final = None
        if self.head is not None:
            weight, bias = (part.detach().cpu().clone() for part in self.head_leaves.values())
            final = Head(weight, bias, *self.scale)
        return TrainedExpert(self.model, self.name, final, losses)


def _with_adapters(base: Base, jobs: Sequence[ExpertJob]) -> Any:
    """Return the base with one trainable adapter for each job, named in their order."""
    from peft import LoraConfig, get_peft_model

    model: Any = None
    for number, job in enumerate(jobs):
        own = job.task.name if job.which.init == "own" else "every task"
        config = LoraConfig(
            r=job.lora.rank,
            lora_alpha=job.lora.alpha,
            target_modules=job.lora.targets,
            lora_dropout=0.0,
            task_type="FEATURE_EXTRACTION" if base.whole is base.model else "CAUSAL_LM",
        )
        with _seeded("lora", job.which.seed, own):
            if model is None:
                model = get_peft_model(base.whole, config, adapter_name=f"task{number}")
            else:
                model.add_adapter(f"task{number}", config)
    model.base_model.set_adapter(list(model.peft_config))  # all of them learn
    # Evaluation mode turns dropout off, so training has no draws beyond the batches.
    return model.eval()


def _go_on_from(file: AdapterFile, leaves: Mapping[str, nn.Parameter], lora: LoRARecipe) -> None:
    """Give a new LoRA an adapter's change; ranks and modules beyond it stay at zero."""
    for module, factors in file.load().modules.items():
        a, b = (leaves[f"{PREFIX}{module}{end}"].data for end in (A, B))
        rank = factors.a.shape[0]
        a[:rank].copy_(factors.a)
        b[:, :rank].copy_(factors.b * (lora.rank / lora.alpha))


def _head(start: Head, device: torch.device) -> nn.Linear:
    outputs, width = start.weight.shape
    head = nn.Linear(width, outputs, device="meta").to_empty(device="cpu")
    head.weight.data.copy_(start.weight)
    head.bias.data.copy_(start.bias)
    return head.to(device)


@contextlib.contextmanager
def _seeded(*key: object) -> Iterator[None]:
    """Seed torch's global generator, which PEFT draws from, and restore it afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_for(*key))
        yield
