"""One task's share of a step: its loss and gradient, a function of values and step alone.

This is what a worker holds. Nothing here knows of other workers, so a step gives the same bytes
whoever makes its parts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from icm_ray.base_model.low_rank import applied
from icm_ray.base_model.readers import Batch, alike, join
from icm_ray.config import OptimisationSpec
from icm_ray.devices import stacked
from icm_ray.errors import InputError
from icm_ray.learning.forward import merged, observe
from icm_ray.learning.inputs import Seen, TaskInputs
from icm_ray.learning.objectives.protocol import Memory, Objective, Scaling, TaskObjective
from icm_ray.learning.parameters import Parameters

NO_SIGNAL = 1e-3
"""Smallest gap between the base's and the expert's loss that a merge can be steered by."""
FAR = 10.0
"""Loss at the start, in units of the base's, from which one task drowns the others."""


@dataclass(frozen=True)
class Learning:
    """One learned merge, ready to run.

    Attributes:
        parameters: What is learned; left at the values it ends with.
        objective: What is minimised.
        optimisation: How the parameters move.
    """

    parameters: Parameters
    objective: Objective
    optimisation: OptimisationSpec


@dataclass(frozen=True)
class TaskLosses:
    """What a task's objective says of fixed models, before any step.

    Attributes:
        base: Components (one per target module, or one) for the base; empty if not compared.
        expert: The same for the task's own expert.
        start: The same for the merge at its start.
        warning: What is wrong with the objective on this task, or None.
    """

    base: list[float]
    expert: list[float]
    start: list[float]
    warning: str | None = None


@dataclass(frozen=True)
class Share:
    """Some tasks' share of one step.

    Attributes:
        losses: Loss by task.
        gradients: Gradient of the weighted sum of these losses by parameter; parameters that no
            loss depends on are left out.
    """

    losses: Mapping[str, float]
    gradients: Mapping[str, Tensor]


class TaskGradients:
    """Losses and gradients of one or more tasks.

    Every task keeps its cached values of expert and base, so each runs once an example.
    """

    def __init__(
        self,
        model: nn.Module,
        learning: Learning,
        tasks: Sequence[TaskInputs],
        *,
        covered: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        """Take what the steps need; `start` has to be called for each task before them.

        Args:
            model: The frozen base.
            learning: What is learned and minimised, over all tasks of the merge.
            tasks: The tasks whose share is made here.
            covered: Every task that the objective says something about, here or elsewhere.
            seed: Keys the order of batches.
        """
        objective, how = learning.objective, learning.optimisation
        self.model, self.parameters, self.scaling = model, learning.parameters, objective.scaling
        self.weights = how.weights(covered) if covered else {}
        self.seed, self.save_memory = seed, how.save_memory
        made = {task.name: objective.of(task) for task in tasks}
        self.tasks = {task.name: task for task in tasks if made[task.name] is not None}
        self.objectives = {name: one for name, one in made.items() if one is not None}
        self.memories: dict[str, list[Memory]] = {}
        self.scales: dict[str, Tensor] = {}

    def start(self, task: str) -> TaskLosses:
        """Run expert and base over a task's inputs, fix its scale, and return what was found."""
        objective = self.objectives[task]
        inputs = self.tasks[task] = self._taught(self.tasks[task])
        self.memories[task] = [{} for _ in inputs.batches]
        base = expert = torch.zeros(0, dtype=torch.float64)
        energy = None
        if objective.compares:
            self.memories[task], base, expert, energy = compare(self.model, inputs, objective)
        start = self._raw(task)
        larger = start if energy is None else torch.maximum(start, energy)
        scales = {"none": None, "energy": energy, "start": start, "larger": larger}
        scale = scales[self.scaling]
        self.scales[task] = torch.ones_like(start) if scale is None else inverse(scale)
        by, warning = self.scales[task], None
        if objective.compares:
            warning = _warning(float((base * by).mean()), float((expert * by).mean()))
            warning = warning or _far(float((start * by).mean()), self.scaling)
            base, expert = base * by, expert * by
        return TaskLosses(base.tolist(), expert.tolist(), (start * by).tolist(), warning)

    @torch.no_grad()
    def _taught(self, inputs: TaskInputs) -> TaskInputs:
        """Return inputs with the expert's answers, if the objective wants them."""
        objective = self.objectives[inputs.name]
        with applied(self.model, inputs.adapter):
            return replace(inputs, batches=objective.taught(self.model, inputs.batches))

    def components(self, task: str) -> list[float]:
        """Return the scaled components over all of a task's inputs at the present values."""
        return (self._raw(task) * self.scales[task]).tolist()

    def load(self, values: Mapping[str, Tensor]) -> None:
        """Set the parameters to what the driver sent."""
        with torch.no_grad():
            for name, leaf in self.parameters.tensors().items():
                leaf.copy_(values[name])

    def gradient(self, tasks: Sequence[str], step: int) -> Share:
        """Return losses and gradient of some tasks on the batches of a step, in one forward."""
        numbers = {task: self.tasks[task].batch_number(self.seed, step) for task in tasks}
        leaves = self.parameters.tensors()
        with merged(self.model, self.parameters.frames, self.parameters.cores()):
            losses = self._losses(numbers)
            total = stacked([self.weights[t] * loss for t, loss in losses.items()]).sum()
            if not total.requires_grad:  # these tasks' targets read what no module changes
                found = [None] * len(leaves)
            else:  # inside the block: recomputed layers need the merge on the model too
                found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        gradients = {name: g for name, g in zip(leaves, found, strict=True) if g is not None}
        return Share({task: float(loss.detach()) for task, loss in losses.items()}, gradients)

    def _losses(self, numbers: Mapping[str, int]) -> dict[str, Tensor]:
        """Return each task's loss on one of its batches; the merge is on the model already."""
        batches = dict(zip(numbers, self._batches(numbers), strict=True))
        losses = {}
        for group in alike(batches):
            for task, part in self._observe(group).items():
                memory = self.memories[task][numbers[task]]
                sums, count = self.objectives[task].measure(batches[task], part, memory)
                losses[task] = (sums / count * self.scales[task].to(sums)).mean()
        return {task: losses[task] for task in numbers}

    def _observe(self, batches: Mapping[str, Batch]) -> dict[str, Seen]:
        """Return what each task's objective asks to see, of one forward over all their batches."""
        modules = sorted({m for task in batches for m in self.objectives[task].modules})
        hidden = any(self.objectives[task].hidden for task in batches)
        every = list(batches.values())
        seen = observe(self.model, join(every), modules, hidden=hidden, save=self.save_memory)
        return dict(zip(batches, seen.split(every), strict=True))

    def _batches(self, numbers: Mapping[str, int]) -> list[Batch]:
        """Return one batch of each task, with the merge's answers if the objective wants them."""
        batches = [self.tasks[task].batches[number] for task, number in numbers.items()]
        # All are of one kind, so any of them decodes for all, in one pass.
        objective = self.objectives[next(iter(numbers))]
        return list(objective.answered(self.model, batches))

    @torch.no_grad()
    def _raw(self, task: str) -> Float[Tensor, " components"]:
        """Return the unscaled components over all inputs at the present values, float64."""
        objective, sums, total = self.objectives[task], [], 0.0
        with merged(self.model, self.parameters.frames, self.parameters.cores()):
            for number in range(len(self.tasks[task].batches)):
                batch = self._batches({task: number})[0]
                seen = observe(self.model, batch, objective.modules, hidden=objective.hidden)
                found, count = objective.measure(batch, seen, self.memories[task][number])
                sums.append(found.double().cpu())
                total += count
        return torch.stack(sums).sum(0) / total


@torch.no_grad()
def compare(
    model: nn.Module, inputs: TaskInputs, objective: TaskObjective
) -> tuple[list[Memory], Tensor, Tensor, Tensor | None]:
    """Run expert and base over a task's inputs.

    Returns:
        What is kept of each batch, mean components of base and of expert, and the energy that
        components may be divided by.

    Raises:
        InputError: inputs never reach a target.
    """
    sums: dict[str, list[Tensor]] = {"base": [], "expert": [], "energy": []}
    total, memories = 0.0, []
    for batch in inputs.batches:
        seen = {}
        for name, adapter in (("base", None), ("expert", inputs.adapter)):
            with applied(model, adapter):
                seen[name] = observe(model, batch, objective.modules, hidden=objective.hidden)
        _check_reached(inputs.name, objective, seen["base"].inputs)
        kept = objective.remember(batch, seen["expert"], seen["base"]) if objective.compares else {}
        memory = dict(kept)
        if "energy" in memory:
            sums["energy"].append(memory.pop("energy").double().cpu())
        memories.append(memory)
        for name in ("base", "expert"):
            found, count = objective.measure(batch, seen[name], memory)
            sums[name].append(found.double().cpu())
        total += count
    mean = {name: torch.stack(s).sum(0) / total for name, s in sums.items() if s}
    return memories, mean["base"], mean["expert"], mean.get("energy")


def inverse(scale: Tensor) -> Tensor:
    """Return what to multiply by; a component that compares with nothing is left as it is."""
    return torch.where(scale > 0, 1 / scale, torch.ones_like(scale))


def _warning(base: float, expert: float) -> str | None:
    if abs(base - expert) < NO_SIGNAL:
        return f"no signal: base {base:.5f} and expert {expert:.5f} are closer than {NO_SIGNAL}"
    if expert > base:
        return f"wrong sign: the expert's {expert:.5f} is above the base's {base:.5f}"
    return None


def _far(start: float, scaling: Scaling) -> str | None:
    """Say so where a task starts so far off that its share of the objective leaves no other."""
    if scaling != "energy" or start < FAR:
        return None
    return (
        f"starts {start:.0f} times as far from its expert as the base is, and outweighs the other "
        "tasks; distillation has objective.unit: larger for that"
    )


def _check_reached(task: str, objective: TaskObjective, seen: Mapping[str, Tensor]) -> None:
    missing = [module for module in objective.modules if module not in seen]
    if missing:
        raise InputError(
            f"task {task!r}: module {missing[0]}: its inputs never reach it, so it is no target. "
            "Name others in the recipe's targets."
        )
