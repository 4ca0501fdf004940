"""An expert before and after its training: what decides its bytes, its batches, its files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from icm_ray.adapters import AdapterFile
from icm_ray.config import ExpertSet, LoRARecipe, Training
from icm_ray.evaluation.heads import Head
from icm_ray.seeding import generator
from icm_ray.suites.tasks import Examples, Task


@dataclass(frozen=True)
class ExpertJob:
    """What is asked of an expert.

    Attributes:
        task: What to learn.
        lora: Rank, alpha and target modules.
        training: Steps, batch, learning rates.
        which: Initialisation of A ("shared" over tasks, or "own") and seed.
        together: Tasks that are trained in the same forward passes, itself among them.
    """

    task: Task
    lora: LoRARecipe
    training: Training
    which: ExpertSet
    together: tuple[str, ...]

    @property
    def described(self) -> dict[str, Any]:
        """What a manifest says of it."""
        alone = len(self.together) == 1
        return {
            "task": self.task.name,
            "set": self.which.model_dump(),
            "lora": self.lora.model_dump(exclude={"start"}),
            "training": self.training.model_dump(exclude={"tasks_per_forward", "trajectory"}),
            **({} if alone else {"together": list(self.together)}),
        }


@dataclass(frozen=True)
class Lesson:
    """A job with what it is learned from.

    Attributes:
        job: Task and hyper-parameters.
        train: At least `job.training.batch` examples.
        start: The probe's head, whose target scale is kept; None for tasks without a head.
        adapter: What the LoRA goes on from; None: its change is zero at first.
    """

    job: ExpertJob
    train: Examples
    start: Head | None
    adapter: AdapterFile | None = None


@dataclass(frozen=True)
class TrainedExpert:
    """What training gives back.

    Attributes:
        model: The PEFT model holding the final adapter.
        name: The adapter's name in the model.
        head: The head, frozen from here on; None if the base answers by itself.
        losses: Loss of every step.
    """

    model: Any
    name: str
    head: Head | None
    losses: list[float]

    def save_adapter(self, folder: Path, dtype: torch.dtype, base_name: str) -> None:
        """Write the adapter in PEFT's format, in `dtype`, naming its base."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        config = self.model.peft_config[self.name]
        config.base_model_name_or_path = base_name
        config.inference_mode = True
        if isinstance(config.target_modules, set):
            # PEFT writes the set in the order of string hashes, another one in every process.
            config.target_modules = sorted(config.target_modules)
        config.save_pretrained(folder)
        # Looking for resized embeddings would ask a hub about the base; there are none here.
        tensors = get_peft_model_state_dict(
            self.model, adapter_name=self.name, save_embedding_layers=False
        )
        plain = {name: tensor.to(dtype).cpu() for name, tensor in tensors.items()}
        save_file(plain, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def batch_rows(job: ExpertJob, examples: int, step: int) -> list[int]:
    """Return the examples of one step: a fresh shuffle each epoch, keyed by task and seed."""
    size = job.training.batch
    rows: list[int] = []
    position = step * size
    while len(rows) < size:
        epoch, offset = divmod(position, examples)
        key = generator("order", job.which.seed, job.task.name, epoch)
        order = torch.randperm(examples, generator=key)
        rows += order[offset : offset + size - len(rows)].tolist()
        position = step * size + len(rows)
    return rows


def losses_summary(losses: list[float]) -> dict[str, float]:
    """Return first and last loss, averaged over up to ten steps each."""
    few = min(10, len(losses))
    return {"first_loss": float(np.mean(losses[:few])), "last_loss": float(np.mean(losses[-few:]))}
