"""The base, its evidence and every learner on another device give what the processor gives."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from icm_ray.base_model.loading import Base, load_base
from icm_ray.base_model.low_rank import applied
from icm_ray.base_model.placing import Place
from icm_ray.base_model.states import features
from icm_ray.config import LearnSpec, changed
from icm_ray.evidence.gather import example_ratios, gather
from icm_ray.evidence.grams import gather_grams
from icm_ray.learning.gradients import TaskGradients, TaskLosses
from icm_ray.learning.learner import covered_tasks, learn
from icm_ray.learning.recipes import LEARNERS, plan_of


@pytest.fixture(scope="module")
def there(tiny_bert, accelerator) -> Base:
    with accelerator.on():
        base = load_base(tiny_bert, Place(device=accelerator.name))
    assert {str(p.device) for p in base.model.parameters()} == {accelerator.name}
    return base


@pytest.fixture(scope="module")
def spread(tiny_bert, accelerator) -> Base:
    with accelerator.on():
        base = load_base(tiny_bert, Place(device=accelerator.several(2), gpus=2))
    assert len({p.device for p in base.model.parameters()}) == 2
    return base


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_evidence(accelerator, tiny, there, adapters, make_tasks) -> None:
    task = make_tasks()[0]
    here = gather(tiny.model, task.adapter, task.batches)
    with accelerator.on():
        found = gather(there.model, task.adapter, task.batches)
    close(found.task_vector, here.task_vector)
    assert found.expert_ratios == pytest.approx(here.expert_ratios, rel=1e-5)
    with applied(tiny.model, adapters[1]):
        expected = features(tiny.model, task.batches)
    with accelerator.on(), applied(there.model, adapters[1]):
        close(features(there.model, task.batches), expected)
    _, by_example = example_ratios(tiny.model, None, task.adapter, task.batches)
    with accelerator.on():
        close(example_ratios(there.model, None, task.adapter, task.batches)[1], by_example)


def test_grams(accelerator, tiny, there, make_tasks, adapters) -> None:
    task, modules = make_tasks()[0], list(adapters[0].modules)
    here = gather_grams(tiny.model, task.adapter, modules, task.batches)
    with accelerator.on():
        found = gather_grams(there.model, task.adapter, modules, task.batches)
    for module, gram in here.grams.items():
        assert {x.device.type for x in found.grams[module].tensors().values()} == {"cpu"}
        close(found.grams[module].square(), gram.square())


def test_evidence_over_two_gpus(accelerator, tiny, spread, adapters, make_tasks) -> None:
    task, modules = make_tasks()[0], list(adapters[0].modules)
    here = gather(tiny.model, task.adapter, task.batches)
    grams = gather_grams(tiny.model, task.adapter, modules, task.batches).grams
    with accelerator.on():
        found = gather(spread.model, task.adapter, task.batches)
        theirs = gather_grams(spread.model, task.adapter, modules, task.batches).grams
    close(found.task_vector, here.task_vector)
    assert found.expert_ratios == pytest.approx(here.expert_ratios, rel=1e-5)
    for module, gram in grams.items():
        close(theirs[module].square(), gram.square())


def short(name: str, **changes: Any) -> LearnSpec:
    spec = changed(LEARNERS[name], changes, name)
    residual = None if spec.start.residual == "regmean" else spec.start.residual
    return spec.model_copy(
        update={
            "optimisation": spec.optimisation.model_copy(update={"steps": 3, "batch": 3}),
            "start": spec.start.model_copy(update={"residual": residual, "value": "1/K"}),
        }
    )


LEARNED = [
    *((name, {}) for name in LEARNERS),
    pytest.param("nsc", {"optimisation": {"save_memory": True}}, marks=pytest.mark.slow),
    pytest.param("task_vector_match", {"objective": {"heads": True}}, marks=pytest.mark.slow),
    pytest.param("task_vector_match", {"start": {"basis": "tsv"}}, marks=pytest.mark.slow),
    pytest.param("atlas", {"parameters": {"groups": "rank"}}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "changes"), LEARNED, ids=lambda value: str(value))
def test_every_learner(accelerator, tiny, there, make_tasks, adapters, name, changes) -> None:
    spec, tasks = short(name, **changes), make_tasks(labels=True)
    plan = plan_of(spec, adapters)
    here = learn(tiny.model, plan.learning(tiny), tasks)
    with accelerator.on():
        found = learn(there.model, plan.learning(there), tasks)
    assert found.report["losses"].keys() == here.report["losses"].keys()
    for key, tensor in here.tensors.items():
        assert found.tensors[key].device.type == "cpu", key
        torch.testing.assert_close(found.tensors[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["nsc"])
def test_a_base_whose_blocks_stay_in_memory(
    accelerator, tiny, tiny_bert, make_tasks, adapters, name
) -> None:
    tasks, plan = make_tasks(labels=True), plan_of(short(name), adapters)
    here = learn(tiny.model, plan.learning(tiny), tasks)
    with accelerator.on():
        base = load_base(tiny_bert, Place(device=accelerator.name, offload=True))
        found = learn(base.model, plan.learning(base), tasks)
    for key, tensor in here.tensors.items():
        torch.testing.assert_close(found.tensors[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["row_space_match", "distillation", "atlas"])
def test_every_objective_over_two_gpus(
    accelerator, tiny, spread, make_tasks, adapters, name
) -> None:
    """Losses alone: torch's autograd knows one stand-in for a GPU and no second."""
    tasks, plan = make_tasks(labels=True), plan_of(short(name), adapters)

    def losses(base: Base) -> dict[str, TaskLosses]:
        learning = plan.learning(base)
        covered = covered_tasks(tasks, learning.objective)
        side = TaskGradients(base.model, learning, tasks, covered=covered)
        return {task: side.start(task) for task in covered}

    here = losses(tiny)
    with accelerator.on():
        found = losses(spread)
    for task, expected in here.items():
        assert found[task].start == pytest.approx(expected.start, rel=1e-4)
        assert found[task].expert == pytest.approx(expected.expert, rel=1e-4, abs=1e-6)


def test_a_coefficient_of_a_half_precision_base_moves_by_its_own_step(
    tiny_bert, make_tasks, adapters
) -> None:
    """bfloat16 has 8 bits: .4 and .401 are one number there, but two results here."""
    half, tasks = load_base(tiny_bert, Place(dtype="bfloat16")), make_tasks()
    spec = short("nsc")
    losses = set()
    for value in (0.4, 0.401, 0.402, 0.403):
        plan = replace(plan_of(spec, adapters), value=value)
        report = learn(half.model, plan.learning(half), tasks).report
        losses.add(str(report["losses"]["code"]["start"]))
    assert len(losses) == 4
