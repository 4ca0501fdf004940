"""Heads fitted to an expert's answers, against least squares by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from icm_ray.adapters import open_adapter, save_adapter
from icm_ray.base_model.loading import load_base
from icm_ray.base_model.low_rank import applied
from icm_ray.evaluation.answers import head_features
from icm_ray.evaluation.heads import Head
from icm_ray.evaluation.realigned import fitted, realigned
from icm_ray.evaluation.scoring import TaskData, evaluate, with_heads
from icm_ray.suites.tasks import Examples, Task

Q = "encoder.layer.1.attention.self.query"


def test_each_output_gets_its_own_slope_and_intercept():
    draw = torch.Generator().manual_seed(0)
    head = Head(torch.randn(3, 5, generator=draw), torch.randn(3, generator=draw), 2.0, 4.0)
    features = torch.randn(40, 5, generator=draw)
    ours, noise = head.logits(features), torch.randn(40, 3, generator=draw)
    theirs = ours * torch.tensor([2.0, -1.0, 0.5]) + torch.tensor([0.0, 3.0, -7.0]) + 0.1 * noise
    found = fitted(head, ours, theirs)
    assert (found.mean, found.std) == (2.0, 4.0)
    for output in range(3):
        slope, start = np.polyfit(ours[:, output].numpy(), theirs[:, output].numpy(), 1)
        expected = slope * ours[:, output] + start
        torch.testing.assert_close(
            found.logits(features)[:, output], expected, atol=1e-4, rtol=1e-4
        )


def test_an_output_that_never_moves_keeps_its_slope():
    head = Head(torch.zeros(1, 5), torch.ones(1))
    found = fitted(head, torch.ones(8, 1), torch.full((8, 1), 4.0))
    torch.testing.assert_close(found.logits(torch.randn(2, 5)), torch.full((2, 1), 4.0))


@pytest.fixture
def setting(tiny_bert, make_adapter, texts, tmp_path):
    """A base, an adapter that shifts features, and a task whose expert does nothing."""
    base = load_base(tiny_bert)
    shift = make_adapter("shift", shapes={Q: (16, 16)}, spread=1.5)
    idle = make_adapter("idle", shapes={Q: (16, 16)}, spread=1e-6)
    save_adapter(idle, tmp_path / "idle")
    width = base.model.config.hidden_size
    head = Head(torch.randn(1, width, generator=torch.Generator().manual_seed(1)), torch.zeros(1))
    task = Task("length", "regression", "r2", (), 32)
    with applied(base.model, open_adapter(tmp_path / "idle").load()):
        blank = Examples(tuple(texts), np.zeros(len(texts)), tuple(texts))
        targets = head.predict(head_features(base, blank, task, 8), task)
    examples = replace(blank, targets=targets)
    expert = open_adapter(tmp_path / "idle", "length")
    return base, shift, {"length": TaskData(task, examples, head, expert)}


def test_a_merge_is_read_as_its_expert_again(setting):
    base, shift, data = setting
    scored = {"length": replace(data["length"], expert=None)}
    before = evaluate(base, shift, scored)["length"].score.value
    heads = realigned(base, shift, data)
    after = evaluate(base, shift, with_heads(scored, heads))["length"].score.value
    assert after > before + 0.01
    assert 0 <= after <= 1, "the r2 of a least-squares fit to the expert's own answers"
    alone = realigned(base, None, data)["length"]
    torch.testing.assert_close(alone.weight, data["length"].head.weight, atol=1e-2, rtol=1e-2)


def test_experts_are_asked_once(setting):
    base, shift, data = setting
    memory = {}
    first = realigned(base, shift, data, memory=memory)["length"]
    ((key, told),) = memory.items()
    memory[key] = told + 1
    again = realigned(base, shift, data, memory=memory)["length"]
    torch.testing.assert_close(again.bias, first.bias + 1)
