"""One task's share of a step: right by finite differences and by identities, the same each time."""

import pytest
import torch

from icm_ray.base_model.loading import find_module
from icm_ray.config import OptimisationSpec
from icm_ray.errors import InputError
from icm_ray.learning.forward import merged
from icm_ray.learning.gradients import Learning, TaskGradients, TaskLosses, inverse
from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.objectives.distillation import Distillation
from icm_ray.learning.objectives.entropy import HeadEntropy
from icm_ray.learning.objectives.null_space_ratio import NullSpaceRatio
from icm_ray.learning.objectives.row_space_match import RowSpaceMatch
from icm_ray.learning.objectives.supervised import Supervised
from icm_ray.learning.objectives.task_vector_match import TaskVectorMatch
from icm_ray.learning.parameters import Coefficients, CoreMatrices
from icm_ray.learning.targets import Targets
from icm_ray.learning.terms import own_terms

EVERYTHING = Targets("all", share=1.0)
OBJECTIVES = {
    "ratio": NullSpaceRatio(EVERYTHING),
    "row space": RowSpaceMatch(EVERYTHING),
    "task vector": TaskVectorMatch(),
    "tokens": TaskVectorMatch("tokens"),
    "heads": TaskVectorMatch(heads=True),
    "entropy": HeadEntropy(),
    "distillation": Distillation(),
    "labels": Supervised(),
}


@pytest.fixture
def share(tiny, make_tasks):
    def make(parameters, objective, batch: int = 8, seed: int = 0, **options) -> TaskGradients:
        how = OptimisationSpec(reduction="sum", **options)
        tasks, names = make_tasks(batch=batch, labels=True), ("code", "law", "med")
        learning = Learning(parameters, objective, how)
        side = TaskGradients(tiny.model, learning, tasks, covered=names, seed=seed)
        for task in side.tasks:
            side.start(task)
        return side

    return make


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("kind", [Coefficients, CoreMatrices])
def test_gradients_are_finite_differences(share, terms, name: str, kind) -> None:
    parameters = kind(terms, 0.4)
    side = share(parameters, OBJECTIVES[name])
    gradients = side.gradient(("code",), 0).gradients
    leaf_name = "encoder.layer.0.attention.self.value"
    leaf, step = parameters.tensors()[leaf_name], 1e-2
    draw = torch.Generator().manual_seed(0)
    direction = torch.randn(leaf.shape, generator=draw)
    direction /= direction.norm()
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            leaf += sign * step * direction
            values.append(side.components("code"))
            leaf -= sign * step * direction
    slope = (sum(values[0]) - sum(values[1])) / len(values[0]) / (2 * step)
    expected = float((gradients[leaf_name] * direction).sum())
    assert slope == pytest.approx(expected, rel=2e-2, abs=2e-5)


def test_a_coefficient_s_gradient_is_the_weight_s_times_the_delta(tiny, share, terms) -> None:
    side = share(Coefficients(terms, 0.4), TaskVectorMatch())
    path = "encoder.layer.0.attention.self.query"
    weight = find_module(tiny.model, path).weight
    gradient = side.gradient(("law",), 0).gradients[path]
    weight.requires_grad_()
    try:
        with merged(tiny.model, side.parameters.frames, side.parameters.cores()):
            loss = side._losses({"law": 0})["law"]
            by_weight = torch.autograd.grad(loss, weight)[0]
    finally:
        weight.requires_grad_(False)
    for row, task in enumerate(terms.tasks):
        expected = (by_weight * terms.modules[path][task].delta()).sum()
        torch.testing.assert_close(gradient[row, 0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["row space", "task vector", "tokens", "distillation"])
def test_one_adapter_with_coefficient_one_is_its_expert(tiny, make_tasks, name: str) -> None:
    task = make_tasks()[1]
    for parameters in (
        Coefficients(own_terms([task.adapter]), 1.0),
        CoreMatrices(own_terms([task.adapter]), 1.0),
    ):
        side = TaskGradients(
            tiny.model,
            Learning(parameters, OBJECTIVES[name], OptimisationSpec()),
            [task],
            covered=[task.name],
        )
        found = side.start(task.name)
        assert found.expert == pytest.approx([0.0] * len(found.expert), abs=1e-9)
        assert found.start == pytest.approx([0.0] * len(found.start), abs=1e-6)
        assert sum(found.base) > 0.01


@pytest.mark.parametrize("name", ["task vector", "tokens", "distillation"])
def test_a_loss_over_its_energy_is_one_for_the_base(share, terms, name: str) -> None:
    side = share(Coefficients(terms, 0.0), OBJECTIVES[name], batch=3)
    for task in side.tasks:
        assert side.components(task) == pytest.approx([1.0], rel=1e-5)


def test_a_loss_over_its_start_is_one_there(share, terms) -> None:
    side = share(Coefficients(terms, 0.4), Supervised(), batch=3)
    for task in ("code", "law", "med"):
        assert side.components(task) == pytest.approx([1.0], rel=1e-6)


def test_means_do_not_depend_on_the_batches(share, terms) -> None:
    for objective in OBJECTIVES.values():
        one, other = (
            share(Coefficients(terms, 0.4), objective, batch=size).components("law")
            for size in (8, 3)
        )
        assert one == pytest.approx(other, rel=1e-4)


def test_steps_repeat_whatever_ran_before(share, terms) -> None:
    objective = OBJECTIVES["row space"]
    first, second = (share(Coefficients(terms, 0.4), objective, batch=3) for _ in range(2))
    second.gradient(("code",), 5)
    values = {n: leaf.detach() + 0.1 for n, leaf in first.parameters.tensors().items()}
    for side in (first, second):
        side.load(values)
    one, two = (side.gradient(("law",), 3) for side in (first, second))
    assert one.losses == two.losses
    assert all(torch.equal(one.gradients[n], two.gradients[n]) for n in one.gradients)


def test_each_epoch_visits_every_batch_in_an_order_of_its_own(make_tasks) -> None:
    task = make_tasks(batch=1)[0]
    orders = [[task.batch_number(0, epoch * 8 + i) for i in range(8)] for epoch in range(3)]
    assert all(sorted(order) == list(range(8)) for order in orders)
    assert orders[0] != orders[1]
    assert orders[0] != [task.batch_number(1, i) for i in range(8)]
    assert orders[0] != [make_tasks(batch=1)[1].batch_number(0, i) for i in range(8)]


@pytest.mark.parametrize("save_memory", [False, True])
def test_tasks_may_share_a_forward(share, terms, save_memory: bool) -> None:
    objective = OBJECTIVES["row space"]
    alone, together = (
        share(Coefficients(terms, 0.4), objective, batch=3, save_memory=save_memory)
        for _ in range(2)
    )
    names = ("code", "law", "med")
    parts = [alone.gradient((name,), 1) for name in names]
    whole = together.gradient(names, 1)
    for part in parts:
        for task, loss in part.losses.items():
            assert whole.losses[task] == pytest.approx(loss, rel=1e-5)
    for name, gradient in whole.gradients.items():
        expected = sum(part.gradients[name] for part in parts if name in part.gradients)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-7)


def test_a_task_s_weight_multiplies_its_gradient_and_not_its_loss(tiny, make_tasks, terms) -> None:
    parts = []
    for weight in (1.0, 3.0):
        how = OptimisationSpec(reduction="sum", task_weights={"law": weight})
        learning = Learning(Coefficients(terms, 0.4), OBJECTIVES["row space"], how)
        side = TaskGradients(tiny.model, learning, make_tasks(), covered=("code", "law", "med"))
        side.start("law")
        parts.append(side.gradient(("law",), 0))
    assert parts[0].losses == parts[1].losses
    for name, gradient in parts[0].gradients.items():
        torch.testing.assert_close(parts[1].gradients[name], 3 * gradient)


def test_a_seed_and_a_step_choose_the_batch(share, terms) -> None:
    losses = []
    for seed in (0, 1):
        side = share(Coefficients(terms, 0.4), TaskVectorMatch(), batch=1, seed=seed)
        losses.append([side.gradient(("law",), step).losses["law"] for step in range(8)])
        task = side.tasks["law"]
        order = [task.batch_number(seed, step) for step in range(8)]
        by_batch = dict(zip(order, losses[-1], strict=True))
        again = share(Coefficients(terms, 0.4), TaskVectorMatch(), batch=1, seed=seed)
        assert [again.gradient(("law",), 8 + i).losses["law"] for i in range(8)] == [
            by_batch[task.batch_number(seed, 8 + i)] for i in range(8)
        ]
    assert losses[0] != losses[1]
    assert sorted(losses[0]) == sorted(losses[1])


def test_what_compares_with_nothing_is_divided_by_nothing() -> None:
    assert inverse(torch.tensor([0.0, 4.0])).tolist() == [1.0, 0.25]


def test_objectives_without_a_signal_are_told(tiny, make_tasks, make_adapter) -> None:
    shapes = {"encoder.layer.1.attention.output.dense": (16, 16)}
    silent = make_adapter("silent", shapes=shapes, spread=1e-4)
    batches = make_tasks()[0].batches
    side = TaskGradients(
        tiny.model,
        Learning(Coefficients(own_terms([silent]), 1.0), NullSpaceRatio(), OptimisationSpec()),
        [TaskInputs(silent, batches)],
        covered=["silent"],
    )
    assert "no signal" in str(side.start("silent").warning)


def test_signs_that_are_wrong_are_told(share, terms) -> None:
    side = share(Coefficients(terms, 0.4), NullSpaceRatio())
    found = {task: side.start(task) for task in side.tasks}
    for losses in found.values():
        gap = sum(losses.expert) / len(losses.expert) - sum(losses.base) / len(losses.base)
        assert ("wrong sign" in str(losses.warning)) == (gap > 1e-3)
    assert any(losses.warning for losses in found.values()), "random adapters have no aim"
    assert any(losses.warning is None for losses in found.values())


def test_a_start_that_is_far_off_is_told_and_may_be_the_unit(share, terms) -> None:
    def losses(value: float, objective: Distillation) -> dict[str, TaskLosses]:
        side = share(Coefficients(terms, value), objective)
        return {task: side.start(task) for task in side.tasks}

    for value in (0.0, 30.0):
        usual = losses(value, Distillation())
        larger = losses(value, Distillation(scaling="larger"))
        assert usual.keys() == larger.keys()
        for task, one in larger.items():
            base, start = usual[task].base[0], usual[task].start[0]
            assert base == pytest.approx(1)
            assert max(one.base[0], one.start[0]) == pytest.approx(1)
            assert one.start[0] / one.base[0] == pytest.approx(start / base, rel=1e-5)
            assert ("outweighs the other tasks" in str(usual[task].warning)) == (start >= 10)
            assert "outweighs" not in str(one.warning)
    assert any("outweighs" in str(one.warning) for one in usual.values())


def test_a_target_that_inputs_never_reach_is_an_error(tiny, make_tasks, make_adapter) -> None:
    unused = make_adapter("u", shapes={"encoder.layer.1.crossattention.output.dense": (16, 16)})
    tiny.model.encoder.layer[1].crossattention = torch.nn.Module()
    tiny.model.encoder.layer[1].crossattention.output = torch.nn.Module()
    tiny.model.encoder.layer[1].crossattention.output.dense = torch.nn.Linear(16, 16)
    try:
        side = TaskGradients(
            tiny.model,
            Learning(Coefficients(own_terms([unused]), 1.0), NullSpaceRatio(), OptimisationSpec()),
            [TaskInputs(unused, make_tasks()[0].batches)],
            covered=["u"],
        )
        with pytest.raises(InputError, match="its inputs never reach it"):
            side.start("u")
    finally:
        del tiny.model.encoder.layer[1].crossattention
