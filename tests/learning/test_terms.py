"""Terms: own deltas, TSV's and RegMean's shares of their merges, fixed rests."""

import pytest
import torch

import icm_ray
from icm_ray.errors import InputError
from icm_ray.learning.terms import own_terms, regmean_terms, summed, tsv_terms
from icm_ray.methods.regmean import regmean
from icm_ray.methods.tsv import tsv
from icm_ray.types import ModuleContext


def context(terms, module: str) -> ModuleContext:
    return ModuleContext(module, tuple(terms.modules[module]), terms.tasks)


def test_own_terms_are_the_adapters_in_order(adapters, terms) -> None:
    again = own_terms(adapters[::-1])
    assert again.tasks == terms.tasks == ("code", "law", "med")
    for module, given_terms in terms.modules.items():
        assert list(given_terms) == list(terms.tasks)
        for adapter in adapters:
            assert given_terms[adapter.name] is adapter.modules[module]


def test_a_sum_of_own_terms_is_task_arithmetic(adapters, terms) -> None:
    merged = icm_ray.merge(adapters, "task_arithmetic", params={"scale": 0.4}).adapter
    for module, factors in summed(terms, 0.4).items():
        torch.testing.assert_close(factors.delta(), merged.modules[module].delta())


def test_tsv_terms_add_up_to_tsv(terms) -> None:
    made = tsv_terms(terms)
    assert not made.own
    for module, factors in summed(made).items():
        expected = tsv(list(terms.modules[module].values()), context=context(terms, module))
        torch.testing.assert_close(factors.delta(), expected.delta(), rtol=1e-4, atol=1e-5)


def test_regmean_terms_add_up_to_regmean_and_lack_of_grams_to_the_mean(terms) -> None:
    draw = torch.Generator().manual_seed(0)
    with_grams, without = sorted(terms.modules)[:2]
    inputs = {task: torch.randn(40, 16, generator=draw) for task in terms.tasks}
    evidence = {f"gram.{task}": x.T @ x / 40 for task, x in inputs.items()}
    made = regmean_terms(terms, lambda m: evidence if m == with_grams else {}, rho=0.9)
    factors = list(terms.modules[with_grams].values())
    about = context(terms, with_grams)
    expected = regmean(factors, context=about, evidence=evidence, rho=0.9)
    torch.testing.assert_close(summed(made)[with_grams].delta(), expected.delta())
    torch.testing.assert_close(summed(made)[without].delta(), summed(terms, 1 / 3)[without].delta())
    for task, term in made.modules[with_grams].items():
        assert term.rank == terms.modules[with_grams][task].rank


def test_a_module_that_only_some_tasks_have(make_adapter) -> None:
    one = make_adapter("a", shapes={"l.0.q": (4, 3)})
    two = make_adapter("b", shapes={"l.0.q": (4, 3), "l.0.v": (4, 3)})
    terms = own_terms([two, one])
    assert {m: list(t) for m, t in terms.modules.items()} == {"l.0.q": ["a", "b"], "l.0.v": ["b"]}
    assert tsv_terms(terms).modules["l.0.v"].keys() == {"b"}


def test_what_cannot_be_learned_is_refused(terms, make_adapter) -> None:
    conv = make_adapter("a", shapes={"c": (4, 9)}, layouts={"c": "conv:3x3"})
    with pytest.raises(InputError, match="module c: a convolution"):
        own_terms([conv])
    stranger = make_adapter("m", shapes={"other": (4, 4)})
    with pytest.raises(InputError, match="module other: in the saved merge but in no adapter"):
        terms.with_residual(stranger.modules)
