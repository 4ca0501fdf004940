import pytest
import torch

from icm_ray.evidence.learned import LearnedMerge
from icm_ray.learning.parameters import Coefficients, CoreMatrices
from icm_ray.learning.shares import shares_of
from icm_ray.learning.terms import own_terms


def learned(parameters):
    return LearnedMerge(parameters.learned(), parameters.terms.tasks, {})


def test_a_coefficient_is_its_own_share(adapters, terms):
    shares, core = shares_of(learned(Coefficients(terms, 0.3)), adapters)
    assert not core
    assert {round(v, 6) for of_task in shares.values() for v in of_task.values()} == {0.3}
    assert set(shares) == {a.name for a in adapters}


def test_one_expert_alone_has_its_factor_as_its_share(adapters):
    alone = adapters[:1]
    shares, core = shares_of(learned(CoreMatrices(own_terms(alone), 0.5)), alone)
    assert core
    assert list(shares[alone[0].name].values()) == pytest.approx([0.5] * len(alone[0].modules))


def test_a_core_of_one_expert_is_that_experts(adapters, terms):
    parameters = CoreMatrices(terms, 0.0)
    first = adapters[0]
    for module, factors in first.modules.items():
        frame = parameters.frames[module]
        core = (frame.left.T @ factors.b) @ (factors.a @ frame.right.T)
        with torch.no_grad():
            parameters.leaves[module].copy_(core / parameters.units[module])
    shares, _ = shares_of(learned(parameters), adapters)
    assert list(shares[first.name].values()) == pytest.approx([1.0] * len(first.modules), abs=1e-4)
    assert max(shares[adapters[1].name].values()) < 1
