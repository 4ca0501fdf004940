"""Evidence of learned methods: from adapters and inputs to a folder that `merge` reads."""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from icm_ray.adapters import AdapterFile, open_adapter
from icm_ray.config import DataSpec, LearnSpec, Resources
from icm_ray.distributed.evidence import Inputs, inputs_key
from icm_ray.distributed.in_context import Context
from icm_ray.distributed.learning import LearnOrder, learn_on_ray
from icm_ray.distributed.shared_base import SharedBase
from icm_ray.evaluation.answers import with_answers
from icm_ray.evaluation.experts import Expert
from icm_ray.evaluation.heads import Head
from icm_ray.evidence.base import load_reader
from icm_ray.evidence.batches import batches_of
from icm_ray.evidence.readers import by_length
from icm_ray.files import RUN_FILE, is_done, read_json, sha256_of, write_json
from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.learner import Run
from icm_ray.learning.recipes import Grams, Plan, covered_by, needs_grams, plan_of
from icm_ray.learning.store import LearnedMerge, save_learned
from icm_ray.methods.given import read_given
from icm_ray.suites import Suite, Task

LEARNED = "LearnedMerge"
"""What learned methods need, as their METHODS rows say."""
VERSION = 1


@dataclass(frozen=True)
class Readable:
    """What objectives that read answers may see of a task.

    Attributes:
        task: Says what the head predicts.
        head: The frozen head; None if the base answers by itself.
        targets: Labels of the task's inputs, answers in words for a generation, for supervised
            objectives; else None.
    """

    task: Task
    head: Head | None
    targets: Sequence[Any] | None = None

    @property
    def answered(self) -> bool:
        """Say whether the labels are answers that follow the inputs."""
        return self.task.kind == "generation" and self.targets is not None


def readable_experts(
    suite: Suite,
    experts: Mapping[str, Expert],
    tasks: Iterable[str],
    data: DataSpec,
    *,
    labelled: bool,
) -> dict[str, Readable]:
    """Return what objectives may read of some tasks: heads, and labels if they are supervised.

    Args:
        suite: What the tasks are.
        experts: By task, whose heads are read.
        tasks: Names of the tasks.
        data: Which inputs the labels belong to.
        labelled: Whether labels may be seen.
    """
    return {
        task: Readable(
            suite.tasks[task],
            experts[task].head(),
            suite.load(task, data.split, data.inputs_per_task).labels if labelled else None,
        )
        for task in tasks
    }


def learned_on_ray(
    spec: LearnSpec,
    files: Sequence[AdapterFile],
    inputs: Inputs,
    readable: Mapping[str, Readable],
    folder: Path,
    *,
    base: Path,
    shared: SharedBase,
    resources: Resources,
    seed: int,
    grams: Callable[[], Path],
    label: str,
    context: Context | None = None,
) -> Path:
    """Learn, or find what was learned in `folder`; return the folder.

    Args:
        spec: The learning recipe.
        files: All adapters of the merge.
        inputs: Unlabelled inputs of each task.
        readable: Heads and labels by task, where there are any.
        folder: Where the evidence goes.
        base: Folder of the base, for its tokenizer.
        shared: The base in the object store.
        resources: What each actor gets.
        seed: Keys the order of batches.
        grams: Gathers Gram statistics; called only if the recipe starts from RegMean.
        label: Shown by the progress bar.
        context: The Fusion-VAE whose latent moves; None: what the recipe's `parameters` say.
    """
    told = grams() if needs_grams(spec) else None
    run_as = shared.run_as(resources)
    key = _key(spec, files, inputs, readable, run_as, seed, resources.threads, told)
    key = sha256_of([key, *context.identity]) if context else key
    if is_done(folder, key):
        return folder
    tasks = task_inputs(files, inputs, readable, base, spec.optimisation.batch)
    adapters = [task.adapter for task in tasks]
    plan = plan_of(spec, adapters, _read_grams(told, files))
    scratch = folder.with_name(f".{folder.name}.learning-{key[:12]}")
    seconds = [cost_of(context.fusion)] if context else []

    def stage(plan: Plan, name: str = "") -> LearnedMerge:
        how, place = plan.spec.optimisation, scratch / name
        place.mkdir(parents=True, exist_ok=True)
        run = Run(seed, how.tasks_per_forward, how.save_memory, resources.threads)
        learned, cost = learn_on_ray(
            shared,
            LearnOrder(plan, tasks, run),
            covered_by(plan.spec.objective, tasks),
            resources,
            origin=plan.spec.model_dump(),
            scratch=place,
            key=key,
            label=f"{label} {name}".strip(),
        )
        seconds.append(cost)
        return learned

    learned = context.learn(stage, plan, adapters) if context else stage(plan)
    counts = {task: len(texts) for task, (texts, _) in inputs.items()}
    save_learned(learned, folder, {"key": key, "inputs": counts})
    write_json(folder / RUN_FILE, {"cpu_seconds": sum(seconds)})
    shutil.rmtree(scratch)
    return folder


def cost_of(folder: Path | None) -> float:
    """Return the processor time that what a folder holds has taken, in seconds."""
    run = folder / RUN_FILE if folder else None
    return float(read_json(run).get("cpu_seconds", 0.0)) if run and run.is_file() else 0.0


def task_inputs(
    files: Sequence[AdapterFile],
    inputs: Inputs,
    readable: Mapping[str, Readable],
    base: Path,
    batch: int,
) -> list[TaskInputs]:
    """Return every task's adapter with its inputs in batches, in the order of names.

    Args:
        files: The adapters.
        inputs: Unlabelled inputs by task.
        readable: Heads and labels by task, where there are any.
        base: Folder of the base, for its tokenizer.
        batch: Inputs a batch.
    """
    reader = load_reader(base)
    made = []
    for file in sorted(files, key=lambda file: file.name):
        known = readable.get(file.name)
        if known is not None and known.answered:
            read = reader.read(*inputs[file.name])
            make = with_answers(reader, read, known.targets or (), known.task)
            batches = [make(rows) for rows in by_length(read, batch)]
        else:
            batches = batches_of(reader, *inputs[file.name], batch)
        if known is None:
            made.append(TaskInputs(file.load(), batches))
            continue
        head, targets = known.head, None
        if head is not None and known.targets is not None:
            values = torch.tensor(known.targets, dtype=torch.float64)
            targets = ((values - head.mean) / head.std).float()
        kind, longest = known.task.kind, known.task.max_new_tokens
        made.append(TaskInputs(file.load(), batches, head, kind, targets, longest))
    return made


def _read_grams(folder: Path | None, files: Sequence[AdapterFile]) -> Grams | None:
    """Return what Gram statistics say of the adapters, by module and task."""
    if folder is None:
        return None
    told, tasks = read_given(folder), [file.name for file in files]
    modules = sorted({module for file in files for module in file.shapes})
    found = {m: told.of(m, ["gram.<task>"], tasks) for m in modules}
    return {
        module: {name.removeprefix("gram."): tensor for name, tensor in of_module.items()}
        for module, of_module in found.items()
        if of_module
    }


def heads_key(readable: Mapping[str, Readable]) -> str:
    """Return what identifies the heads that objectives read, and whether they read labels."""
    heads = {
        task: [known.head.weight.tolist(), known.head.bias.tolist(), known.targets is not None]
        if known.head is not None
        else [known.task.kind, known.targets]
        if known.answered
        else known.task.kind
        for task, known in readable.items()
    }
    return sha256_of(heads)


def _beneath(residual: str | None) -> str | None:
    """Return what identifies a saved merge that learning starts on."""
    named = residual not in (None, "regmean")
    return open_adapter(Path(str(residual))).fingerprint() if named else None


def _key(
    spec: LearnSpec,
    files: Sequence[AdapterFile],
    inputs: Inputs,
    readable: Mapping[str, Readable],
    base: str,
    seed: int,
    threads: int,
    told: Path | None,
) -> str:
    """Return what identifies a learned merge; `told` are Gram statistics it starts from."""
    content: dict[str, Any] = {
        "version": VERSION,
        "spec": spec.model_dump(),
        "adapters": {file.name: file.fingerprint() for file in files},
        "inputs": {task: inputs_key(*told) for task, told in inputs.items()},
        "heads": heads_key(readable),
        "base": base,
        "seed": seed,
        "threads": threads,
        "grams": read_given(told).identity if told else None,
        "beneath": _beneath(spec.start.residual),
    }
    return sha256_of(content)
