"""Parametrisations: exact low-rank results, starts, links, and tensors that rebuild the merge."""

import pytest
import torch
from learning_samples import merged_factors, rebuilt

from icm_ray.evidence.learned import LearnedMerge
from icm_ray.learning.parameters import Coefficients, CoreMatrices, Factors
from icm_ray.learning.terms import own_terms, summed, tsv_terms


def moved(parameters, size: float = 0.3):
    draw = torch.Generator().manual_seed(1)
    for leaf in parameters.tensors().values():
        leaf.data += size * torch.randn(leaf.shape, generator=draw)
    return parameters


def variants(terms):
    residual = terms.with_residual(summed(tsv_terms(terms), 0.7))
    return {
        "coefficients": Coefficients(terms, 0.3),
        "groups": Coefficients(terms, 0.3, groups=2),
        "ranks": Coefficients(terms, 0.3, groups="rank"),
        "by block": Coefficients(terms, 0.3, sharing="block"),
        "tsv": Coefficients(tsv_terms(terms), 0.3),
        "residual": Coefficients(residual, 0.1),
        "core": CoreMatrices(terms, 0.3),
        "core on tsv": CoreMatrices(tsv_terms(terms), 0.3),
        "core and residual": CoreMatrices(residual, 0.0),
        "core around residual": CoreMatrices(residual, 0.0, extend=True),
        "factors": Factors(terms, 3),
        "factors and residual": Factors(residual, "sum"),
    }


NAMES = (
    "coefficients",
    "groups",
    "ranks",
    "by block",
    "tsv",
    "residual",
    "core",
    "core on tsv",
    "core and residual",
    "core around residual",
    "factors",
    "factors and residual",
)


@pytest.mark.parametrize("name", NAMES)
def test_stored_tensors_give_the_same_merge_bit_for_bit(terms, adapters, name: str) -> None:
    parameters = moved(variants(terms)[name])
    prints = {a.name: a.fingerprint for a in adapters}
    learned = LearnedMerge(parameters.learned(), terms.tasks, prints)
    modules = rebuilt(learned, adapters[::-1])
    for module, factors in merged_factors(parameters).items():
        assert torch.equal(modules[module].a, factors.a)
        assert torch.equal(modules[module].b, factors.b)


@pytest.mark.parametrize("name", ["coefficients", "groups", "ranks", "core"])
def test_a_start_is_that_scale_of_the_sum(terms, name: str) -> None:
    found = merged_factors(variants(terms)[name])
    for module, factors in summed(terms, 0.3).items():
        torch.testing.assert_close(found[module].delta(), factors.delta(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["core and residual", "core around residual", "factors and residual"]
)
def test_a_residual_is_where_a_core_of_zero_starts(terms, name: str) -> None:
    found = merged_factors(variants(terms)[name])
    for module, factors in summed(tsv_terms(terms), 0.7).items():
        torch.testing.assert_close(found[module].delta(), factors.delta(), rtol=1e-4, atol=1e-5)


def test_coefficients_multiply_what_they_should(terms) -> None:
    parameters = moved(Coefficients(terms, 0.3, groups="rank"))
    module = sorted(terms.modules)[0]
    values = parameters.learned()[f"{module}.coefficients"]
    assert values.shape == (3, 3)
    expected = torch.zeros(16, 16)
    for row, (task, columns) in enumerate([("code", (0, 1)), ("law", (0, 1, 2)), ("med", (0, 1))]):
        own = terms.modules[module][task]
        for rank, column in enumerate(columns):
            # A task of fewer ranks than there are columns leaves some of them out.
            at = rank * 3 // own.rank
            assert at >= column
            expected += values[row, at] * torch.outer(own.b[:, rank], own.a[rank])
    torch.testing.assert_close(merged_factors(parameters)[module].delta(), expected)


def test_modules_share_coefficients(terms) -> None:
    assert sorted(Coefficients(terms, 0.1, sharing="block").tensors()) == [
        "encoder.layer.0",
        "encoder.layer.1",
    ]
    assert list(Coefficients(terms, 0.1, sharing="adapter").tensors()) == ["adapter"]


@pytest.mark.parametrize("link", ["raw", "clamp", "softplus", "sigmoid"])
def test_links_start_where_they_are_told(terms, link) -> None:
    parameters = Coefficients(terms, 0.3, link=link)
    for values in parameters.values().values():
        torch.testing.assert_close(values, torch.full((3, 1), 0.3))


def test_a_clamp_has_no_gradient_outside(terms) -> None:
    parameters = Coefficients(terms, 0.5, link="clamp")
    leaf = next(iter(parameters.tensors().values()))
    leaf.data[:, 0] = torch.tensor([-0.1, 0.5, 1.1])
    values = next(iter(parameters.values().values()))
    assert values.flatten().tolist() == [0.0, 0.5, 1.0]
    assert torch.autograd.grad(values.sum(), leaf)[0].flatten().tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(("rank", "expected"), [(5, 5), ("largest", 3), ("sum", 7)])
def test_a_new_lora_has_the_rank_that_is_asked_for(terms, rank, expected) -> None:
    made = Factors(terms, rank)
    for module in terms.modules:
        frame, bound = made.frames[module], made.frames[module].right.shape[1] ** -0.5
        assert (frame.left.shape[1], frame.right.shape[0]) == (expected, expected)
        assert not frame.left.any()
        assert 0.5 * bound < frame.right.abs().max() <= bound
    again = Factors(terms, rank).tensors()
    assert all(torch.equal(leaf, again[name]) for name, leaf in made.tensors().items())


def test_cores_reach_whatever_the_bases_span(terms) -> None:
    """Any product between the tasks' rows and columns is some core: no dimension is missing."""
    parameters = CoreMatrices(terms, 0.0)
    module = sorted(terms.modules)[0]
    around, own = parameters.frames[module], terms.modules[module]
    cross = own["code"].b @ own["law"].a[:2]
    core = around.left.T @ cross @ around.right.T
    torch.testing.assert_close(around.left @ core @ around.right, cross, rtol=1e-4, atol=1e-5)


def test_a_leaf_of_ones_is_as_large_as_a_term(terms) -> None:
    parameters = CoreMatrices(terms, 0.0)
    for leaf in parameters.tensors().values():
        leaf.data.fill_(1.0)
    for module, core in parameters.cores().items():
        norms = [float(f.delta().norm()) for f in terms.modules[module].values()]
        typical = (sum(n**2 for n in norms) / len(norms)) ** 0.5
        assert float(core.detach().norm()) == pytest.approx(typical, rel=1e-4)


def test_equal_adapters_and_empty_modules_do_no_harm(make_adapter) -> None:
    one, two = (make_adapter(name, seed=1, rank=2) for name in ("a", "b"))
    empty = make_adapter("c", rank=0)
    terms = own_terms([one, two, empty])
    for parameters in (CoreMatrices(terms, 0.5), Coefficients(terms, 0.5, groups="rank")):
        for module, factors in merged_factors(parameters).items():
            torch.testing.assert_close(
                factors.delta(), one.modules[module].delta(), rtol=1e-4, atol=1e-5
            )
    everything = own_terms([empty])
    for parameters in (CoreMatrices(everything, 0.5), Coefficients(everything, 0.5)):
        assert not any(f.delta().any() for f in merged_factors(parameters).values())
