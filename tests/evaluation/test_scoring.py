"""Scoring: an adapter on every task, and where a merge stands between base and experts."""

import math

import numpy as np
import pytest
import torch

from icm_ray.base_model.loading import load_base
from icm_ray.evaluation.heads import Head
from icm_ray.evaluation.scoring import Standing, TaskData, evaluate, standing_of
from icm_ray.suites.tasks import Examples, Task
from icm_ray.types import LoRAFactors

CLASSES = Task("classes", "classification", "accuracy", ("x", "y"), 16, "nowhere", "none")
NUMBERS = Task("numbers", "regression", "r2", (), 16, "nowhere", "none")


@pytest.fixture(scope="module")
def base(tiny_bert):
    return load_base(tiny_bert)


@pytest.fixture
def tasks(texts) -> dict[str, TaskData]:
    draw = torch.Generator().manual_seed(0)

    def item(task: Task, targets: list[float]) -> TaskData:
        head = Head(
            torch.randn(task.outputs, 16, generator=draw), torch.zeros(task.outputs), 2.0, 3.0
        )
        return TaskData(task, Examples(texts, np.array(targets), texts), head)

    return {
        "classes": item(CLASSES, [float(i % 2) for i in range(24)]),
        "numbers": item(NUMBERS, [float(i) for i in range(24)]),
    }


@pytest.fixture
def adapter(make_adapter):
    shapes = {f"encoder.layer.{i}.attention.self.query": (16, 16) for i in range(2)}
    return make_adapter("x", shapes=shapes)


def one_by_one(base, item: TaskData) -> np.ndarray:
    with torch.no_grad():
        states = []
        for text in item.examples.texts:
            ids = base.tokenizer(text, return_tensors="pt")["input_ids"]
            states.append(base.model(input_ids=ids).last_hidden_state[0].mean(0))
    return item.head.predict(torch.stack(states), item.task)


@pytest.mark.parametrize("batch", [1, 7, 64])
def test_predictions_are_the_head_s_on_pooled_states(base, tasks, batch: int) -> None:
    found = evaluate(base, None, tasks, batch=batch)
    for name, item in tasks.items():
        np.testing.assert_allclose(found[name].predictions, one_by_one(base, item), rtol=1e-4)
        assert found[name].score.metric == item.task.metric


def test_the_adapter_is_on_while_scoring_and_off_afterwards(base, tasks, adapter) -> None:
    plain = evaluate(base, None, tasks)["numbers"].predictions
    changed = evaluate(base, adapter, tasks)["numbers"].predictions
    assert np.abs(changed - plain).max() > 0.1
    assert np.array_equal(evaluate(base, None, tasks)["numbers"].predictions, plain)


def test_threads_are_as_before(base, tasks) -> None:
    before = torch.get_num_threads()
    evaluate(base, None, tasks, threads=2)
    assert torch.get_num_threads() == before


def test_an_adapter_of_nothing_scores_as_the_base(base, tasks, adapter_around) -> None:
    path = "encoder.layer.0.attention.self.query"
    nothing = adapter_around("n", {path: LoRAFactors(torch.zeros(1, 16), torch.zeros(16, 1))})
    for name, found in evaluate(base, nothing, tasks).items():
        expected = evaluate(base, None, tasks)[name]
        assert np.array_equal(found.predictions, expected.predictions)
        assert found.score == expected.score


def test_standing_by_hand() -> None:
    found = standing_of({"a": 0.6, "b": 0.9}, {"a": 0.8, "b": 0.9}, {"a": 0.4, "b": 0.5})
    assert found.normalised == pytest.approx({"a": 0.75, "b": 1.0})
    assert found.gain_kept == pytest.approx({"a": 0.5, "b": 1.0})
    assert found.mean == pytest.approx(0.875)
    assert found.worst == pytest.approx(0.75)


def test_experts_without_score_or_gain_have_no_share() -> None:
    found = standing_of({"a": 0.1, "b": 0.5}, {"a": -0.2, "b": 0.4}, {"a": -0.5, "b": 0.4})
    assert math.isnan(found.normalised["a"])
    assert found.gain_kept["a"] == pytest.approx(2.0)
    assert math.isnan(found.gain_kept["b"])


def test_the_worst_of_one_task_is_its_own() -> None:
    assert Standing({"a": 0.3}, {"a": 0.1}).worst == 0.3
