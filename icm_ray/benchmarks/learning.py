"""A step of learned merging: ours beside the loop one would write first."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from icm_ray.base_model.loading import find_module
from icm_ray.base_model.states import make_batches
from icm_ray.benchmarks.memory import random_adapter
from icm_ray.config import BenchmarkRecipe, ObjectiveSpec, OptimisationSpec, StepsBenchmark
from icm_ray.errors import RecipeError
from icm_ray.learning.gradients import Learning, TaskGradients
from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.objectives import objective_of
from icm_ray.learning.objectives.protocol import Objective
from icm_ray.learning.objectives.token_entropy import TokenEntropy
from icm_ray.learning.parameters import Coefficients
from icm_ray.learning.terms import own_terms
from icm_ray.linalg.subspace import null_space_ratio, row_space
from icm_ray.seeding import generator
from icm_ray.types import Adapter

Gradient = dict[str, Tensor]
"""`(tasks,)` by module."""


@dataclass(frozen=True)
class StepRow:
    """One comparison of steps.

    Attributes:
        label: Of the comparison.
        tokens: Of each input.
        adapters: Number of tasks.
        ours: Median CPU seconds of a step over all tasks.
        peer: The straightforward loop's.
        start: Our CPU seconds before the first step, once a run.
        off: Largest difference of a module's gradient, relative to the whole gradient.
        goal: What is asked of the ratio.
    """

    label: str
    tokens: int
    adapters: int
    ours: float
    peer: float
    start: float
    off: float
    goal: str


def compare_steps(how: StepsBenchmark, recipe: BenchmarkRecipe) -> list[StepRow]:
    """Time steps over every length at the first number of adapters, then over the numbers."""
    torch.set_num_threads(1)
    model = _model(how.model, recipe.seed)
    pairs = [(tokens, how.adapters[0]) for tokens in how.tokens]
    pairs += [(how.tokens[0], count) for count in how.adapters[1:]]
    return [_compared(how, recipe, model, tokens, count) for tokens, count in pairs]


def _model(config: dict[str, Any], seed: int) -> nn.Module:
    """Return a base with random weights: a step's cost does not depend on what they are."""
    from transformers import AutoConfig, AutoModel

    kind = config.get("model_type")
    if kind is None:
        raise RecipeError("learning.model: no model_type. Name one that transformers knows.")
    plain = {name: value for name, value in config.items() if name != "model_type"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModel.from_config(AutoConfig.for_model(kind, **plain))
    return model.eval().requires_grad_(False)


def _compared(
    how: StepsBenchmark, recipe: BenchmarkRecipe, model: Any, tokens: int, count: int
) -> StepRow:
    tasks = _tasks(how, recipe, model, tokens, count)
    started = time.process_time()
    parameters = Coefficients(own_terms([task.adapter for task in tasks]), 1 / count)
    learning = Learning(parameters, _objective(how.objective, model), OptimisationSpec())
    side = TaskGradients(model, learning, tasks, covered=[task.name for task in tasks])
    for task in tasks:
        side.start(task.name)
    start = time.process_time() - started

    names, size = [task.name for task in tasks], how.tasks_per_forward
    groups = [names[i : i + size] for i in range(0, count, size)]

    def ours() -> Gradient:
        sums: Gradient = {}
        for group in groups:
            for module, part in side.gradient(group, 0).gradients.items():
                sums[module] = sums.get(module, 0) + part[:, 0]
        return sums

    calls = {"ours": ours, "peer": Straightforward(how.objective, model, tasks).step}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    gradients: dict[str, Gradient] = {}
    for _ in range(how.repeats):
        for name, call in calls.items():
            begun = time.process_time()
            gradients[name] = call()
            seconds[name].append(time.process_time() - begun)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    off = _off(gradients["ours"], gradients["peer"])
    return StepRow(how.label, tokens, count, middle["ours"], middle["peer"], start, off, how.goal)


def _off(ours: Gradient, theirs: Gradient) -> float:
    whole = torch.stack([g.double().norm() for g in theirs.values()]).norm()
    gaps = [(ours.get(m, torch.zeros_like(g)) - g).double().norm() for m, g in theirs.items()]
    return float(max(gaps) / whole)


def _tasks(
    how: StepsBenchmark, recipe: BenchmarkRecipe, model: Any, tokens: int, count: int
) -> list[TaskInputs]:
    shapes = {
        path: list(module.weight.shape)
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.endswith(tuple(how.targets))
    }
    if not shapes:
        raise RecipeError(
            f"learning.{how.label}.targets: no module of the model ends in "
            f"{', '.join(how.targets)}. Name its linear layers."
        )
    tasks = []
    for k in range(count):
        draw = generator("benchmark inputs", recipe.seed, k)
        size = (how.batch, tokens)
        ids = torch.randint(10, model.config.vocab_size, size, generator=draw).tolist()
        adapter = random_adapter(shapes, f"task{k:02}", recipe.rank, recipe.seed)
        tasks.append(TaskInputs(adapter, make_batches(ids, how.batch, 0)))
    return tasks


def _objective(spec: ObjectiveSpec, model: Any) -> Objective:
    if spec.kind != "token_entropy":
        return objective_of(spec, None)
    return TokenEntropy(_readout(model), spec.max_new_tokens, None, spec.reduction)


def _readout(model: Any) -> Callable[[Tensor], Tensor]:
    weight = model.get_input_embeddings().weight
    return lambda hidden: F.linear(hidden, weight)


class Straightforward:
    """Merged weights as matrices, whole forward passes with the head, nothing kept.

    One forward and one backward a task and step (for answers: a token), hooks on every target; an
    objective that compares with the expert runs it again in every step.
    """

    def __init__(self, spec: ObjectiveSpec, model: Any, tasks: list[TaskInputs]) -> None:
        """Make every adapter's delta, and coefficients of 1 / K."""
        self.spec, self.model, self.tasks = spec, model, tasks
        self.deltas = {
            path: torch.stack([task.adapter.modules[path].delta() for task in tasks])
            for path in tasks[0].adapter.modules
        }
        self.leaves = {
            path: torch.full((len(tasks),), 1 / len(tasks)).requires_grad_() for path in self.deltas
        }
        self.head = _readout(model)
        objective, self.targets = _objective(spec, model), {}
        for task in tasks:
            made = objective.of(task)
            assert made is not None
            self.targets[task.name] = made.modules

    def step(self) -> Gradient:
        """Return the gradient of the mean loss over all tasks."""
        for leaf in self.leaves.values():
            leaf.grad = None
        for task in self.tasks:
            if self.spec.kind == "token_entropy":
                self._answer(task)
            else:
                (self._loss(task) / len(self.tasks)).backward()
        return {p: leaf.grad for p, leaf in self.leaves.items() if leaf.grad is not None}

    def _run(
        self, weights: dict[str, Tensor], ids: Tensor, targets: tuple[str, ...]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the targets' inputs and the logits."""
        seen: dict[str, Tensor] = {}

        def keeper(path: str) -> Callable[..., None]:
            return lambda _module, given: seen.__setitem__(path, given[0])

        handles = [
            find_module(self.model, path).register_forward_pre_hook(keeper(path))
            for path in targets
        ]
        named = {f"{path}.weight": weight for path, weight in weights.items()}
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        state = torch.func.functional_call(self.model, named, (), given).last_hidden_state
        for handle in handles:
            handle.remove()
        return seen, self.head(state)

    def _merged(self) -> dict[str, Tensor]:
        return {
            path: self._weight(path) + torch.einsum("k,koi->oi", self.leaves[path], deltas)
            for path, deltas in self.deltas.items()
        }

    def _weight(self, path: str) -> Tensor:
        found: Any = find_module(self.model, path)
        return found.weight

    def _loss(self, task: TaskInputs) -> Tensor:
        ids, targets = task.batches[0].data, self.targets[task.name]
        expert: dict[str, Tensor] = {}
        if self.spec.kind == "row_space_match":
            with torch.no_grad():
                own = {p: self._weight(p) + f.delta() for p, f in task.adapter.modules.items()}
                expert, _ = self._run(own, ids, targets)
        seen, _ = self._run(self._merged(), ids, targets)
        return torch.stack([_of_target(task.adapter, p, seen, expert) for p in targets]).mean()

    def _answer(self, task: TaskInputs) -> None:
        """Answer greedily, the whole text again for each token, and go back at once each time."""
        ids, length = task.batches[0].data, self.spec.max_new_tokens
        for _ in range(length):
            _, logits = self._run(self._merged(), ids, ())
            log = logits[:, -1].log_softmax(-1)
            entropy = -(log.exp() * log).sum(-1).mean()
            (entropy / length / len(self.tasks)).backward()
            ids = torch.cat([ids, logits[:, -1:].argmax(-1).detach()], 1)


def _of_target(
    adapter: Adapter, path: str, seen: dict[str, Tensor], expert: dict[str, Tensor]
) -> Tensor:
    basis = row_space(adapter.modules[path].a)
    if not expert:
        return null_space_ratio(seen[path].flatten(0, 1), basis).mean()
    right = expert[path] @ basis
    return (seen[path] @ basis - right).square().sum() / right.square().sum()
