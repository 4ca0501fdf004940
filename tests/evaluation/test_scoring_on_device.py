"""Scores of a base on another device are the processor's."""

import numpy as np
import pytest
import torch

from icm_ray.base_model.loading import load_base
from icm_ray.base_model.placing import Place
from icm_ray.evaluation.heads import Head
from icm_ray.evaluation.scoring import TaskData, evaluate
from icm_ray.suites.tasks import Examples, Task

KINDS = {
    "classification": ("accuracy", ("x", "y")),
    "regression": ("r2", ()),
    "language_modelling": ("token_likelihood", ()),
    "generation": ("exact_match", ()),
}


@pytest.mark.parametrize("kind", KINDS)
def test_scores(accelerator, tiny_bert, tiny_llama, texts, make_adapter, kind) -> None:
    metric, classes = KINDS[kind]
    task = Task("one", kind, metric, classes, 16, "nowhere", "none")
    headed = kind in ("classification", "regression")
    path = tiny_bert if headed else tiny_llama
    module = "encoder.layer.1.attention.self.query" if headed else "model.layers.1.self_attn.q_proj"
    adapter = make_adapter("x", shapes={module: (16, 16)})
    head = Head(torch.randn(task.outputs, 16), torch.zeros(task.outputs)) if headed else None
    targets = np.array([float(i % 2) for i in range(len(texts))])
    answers = tuple(text.split()[0] for text in texts)
    data = {"one": TaskData(task, Examples(tuple(texts), targets, tuple(texts), answers), head)}
    here = evaluate(load_base(path), adapter, data, batch=4)
    with accelerator.on():
        there = evaluate(load_base(path, Place(device=accelerator.name)), adapter, data, batch=4)
    found, expected = there["one"].predictions, here["one"].predictions
    if found.dtype.kind == "f":
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    else:
        assert (found == expected).all()
