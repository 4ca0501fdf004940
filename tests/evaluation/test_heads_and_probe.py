"""Heads: saved exactly, read in the target's units; probes: better than chance, and a real head."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import icm_ray
from icm_ray.errors import InputError
from icm_ray.evaluation.experts import HEAD, METRICS, find_experts
from icm_ray.evaluation.heads import Head, loss, target_scale
from icm_ray.evaluation.metrics import score
from icm_ray.evaluation.probe import fit_probe
from icm_ray.suites.tasks import Task


def make_task(kind: str, classes: int = 0) -> Task:
    metric = "accuracy" if kind == "classification" else "r2"
    return Task("t", kind, metric, tuple(map(str, range(classes))), 16, "nowhere", "none")


TWO, THREE, NUMBER = (
    make_task("classification", 2),
    make_task("classification", 3),
    make_task("regression"),
)


def test_heads_round_trip(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    head = Head(torch.randn(3, 5, generator=draw), torch.randn(3, generator=draw), 1877.125, 0.1)
    head.save(tmp_path / "head.safetensors")
    again = Head.load(tmp_path / "head.safetensors")
    assert torch.equal(again.weight, head.weight)
    assert torch.equal(again.bias, head.bias)
    assert (again.mean, again.std) == (head.mean, head.std)


def test_classes_are_argmaxes_and_numbers_are_in_the_target_s_units() -> None:
    features = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    classes = Head(torch.eye(2), torch.tensor([0.0, -1.5])).predict(features, TWO)
    assert classes.tolist() == [0.0, 1.0]
    assert classes.dtype == np.float64
    numbers = Head(torch.tensor([[1.0, 1.0]]), torch.tensor([0.5]), 100.0, 10.0)
    assert numbers.predict(features, NUMBER).tolist() == [115.0, 125.0]


def test_regression_targets_are_standardised() -> None:
    targets = np.array([1.0, 3.0])
    assert target_scale(NUMBER, targets) == (2.0, 1.0)
    assert target_scale(NUMBER, np.array([5.0, 5.0])) == (5.0, 1.0), "no division by zero"
    assert target_scale(TWO, targets) == (0.0, 1.0)


def test_losses_are_those_of_torch() -> None:
    logits, classes = torch.randn(4, 3), torch.tensor([0.0, 2.0, 1.0, 0.0], dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(logits, classes.long())
    torch.testing.assert_close(loss(logits, classes, THREE), expected)
    numbers = torch.randn(4, dtype=torch.float64)
    expected = (logits[:, 0] - numbers.float()).square().mean()
    torch.testing.assert_close(loss(logits[:, :1], numbers, NUMBER), expected)


def data(task: Task, n: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Return features with a large offset and unequal scales, and targets they determine."""
    draw = torch.Generator().manual_seed(seed)
    plain = torch.randn(n, 6, generator=draw)
    if task.classes:
        targets = plain[:, : len(task.classes)].argmax(1).double()
    else:
        targets = 1900 + 30 * plain[:, 0].double() - 10 * plain[:, 1].double()
    scales = torch.tensor([1.0, 10.0, 0.1, 1.0, 5.0, 0.01])
    return plain * scales + 3, targets.numpy()


@pytest.mark.parametrize("task", [TWO, THREE, NUMBER], ids=["two", "three", "number"])
def test_a_probe_beats_chance_where_there_is_something_to_read(task: Task) -> None:
    test_features, targets = data(task, 100, 2)
    head = fit_probe(task, data(task, 200, 0), data(task, 50, 1))
    assert head.weight.shape == (task.outputs, 6)
    found = score(task, head.predict(test_features, task), targets)
    assert found.value > 0.9
    again = fit_probe(task, data(task, 200, 0), data(task, 50, 1))
    assert torch.equal(again.weight, head.weight)


@pytest.mark.parametrize("task", [TWO, NUMBER], ids=["two", "number"])
def test_a_probe_does_not_invent(task: Task) -> None:
    noise = np.random.default_rng(0)

    def shuffled(n: int, seed: int) -> tuple[torch.Tensor, np.ndarray]:
        features, targets = data(task, n, seed)
        return features, noise.permutation(targets)

    head = fit_probe(task, shuffled(200, 0), shuffled(100, 1))
    features, targets = shuffled(300, 2)
    found = score(task, head.predict(features, task), targets)
    assert found.value < (0.6 if task.classes else 0.05)


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_a_class_that_training_lacks_is_never_predicted(absent: int) -> None:
    features, targets = data(THREE, 300, 0)
    keep = targets != absent
    head = fit_probe(THREE, (features[torch.from_numpy(keep)], targets[keep]), data(THREE, 60, 1))
    assert head.weight.shape == (3, 6)
    assert absent not in head.predict(features, THREE)


def test_experts_are_found_by_their_heads(make_adapter, tmp_path: Path) -> None:
    for name in ("b", "a"):
        icm_ray.save_adapter(make_adapter(name), tmp_path / name / "adapter")
        Head(torch.ones(1, 2), torch.zeros(1)).save(tmp_path / name / HEAD)
        (tmp_path / name / METRICS).write_text(json.dumps({"losses": [1.0]}))
    (tmp_path / "no expert").mkdir()
    found = find_experts(tmp_path)
    assert list(found) == ["a", "b"]
    assert found["a"].adapter == tmp_path / "a" / "adapter"
    assert found["a"].metrics() == {"losses": [1.0]}
    assert torch.equal(found["b"].head().weight, torch.ones(1, 2))
    with pytest.raises(InputError, match="no expert in it"):
        find_experts(tmp_path / "a")
