"""RegMean against the normal equations, and modules or tasks without a Gram."""

import pytest
import torch
from factor_samples import TOY, assert_close, check, context, dense, draw_factors, for_any_stack

from icm_ray.errors import InputError
from icm_ray.methods.regmean import regmean
from icm_ray.types import LoRAFactors, ModuleContext


def grams_of(tasks, d_in: int, rows: int = 40) -> dict[str, torch.Tensor]:
    found = {}
    for task in tasks:
        draw = torch.Generator().manual_seed(ord(task))
        x = torch.randn(rows, d_in, generator=draw) * torch.linspace(0.5, 2, d_in)
        found[f"gram.{task}"] = x.T @ x / rows
    return found


def with_grams(factors: list[LoRAFactors], *, context: ModuleContext, **params) -> LoRAFactors:
    told = grams_of(context.all_tasks, factors[0].shape[1])
    return regmean(factors, context=context, evidence=told, **params)


@for_any_stack
def test_what_every_merge_promises(factors: list[LoRAFactors]) -> None:
    check(with_grams, factors)


@for_any_stack
def test_and_without_grams(factors: list[LoRAFactors]) -> None:
    check(regmean, factors)


@for_any_stack
def test_one_adapter_comes_back(factors: list[LoRAFactors]) -> None:
    assert_close(dense(with_grams(factors[:1], context=context(1))), factors[0].delta())


def test_one_adapter_comes_back_where_inputs_leave_directions_empty() -> None:
    one = draw_factors(6, 12, 3)
    few = grams_of("a", 12, rows=4)
    found = regmean([one], context=context(1), evidence=few)
    assert_close(dense(found), one.delta())


def test_toy_value() -> None:
    grams = {"gram.a": torch.diag(torch.tensor([2.0, 1.0])), "gram.b": torch.eye(2)}
    found = regmean(TOY, context=context(2), evidence=grams, ridge=0.0)
    expected = torch.tensor([[1, 1.5], [-1 / 3, 1]])
    torch.testing.assert_close(dense(found), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_solution_of_the_joint_regression(rho: float, dtype: torch.dtype) -> None:
    factors = [draw_factors(9, 8, rank, seed=rank) for rank in (2, 5, 1)]
    grams = {name: gram.to(dtype) for name, gram in grams_of("abc", 8).items()}
    left, right = torch.zeros(8, 8).double(), torch.zeros(9, 8).double()
    for f, gram in zip(factors, grams.values(), strict=True):
        g = gram.double() * rho + torch.diag(gram.double().diagonal()) * (1 - rho)
        left += g
        right += f.b.double() @ f.a.double() @ g
    found = regmean(factors, context=context(3), evidence=grams, rho=rho, ridge=0.0, scale=0.7)
    assert found.rank == 8
    assert_close(dense(found), 0.7 * (right @ torch.linalg.inv(left)).float())


def test_grams_are_left_as_they_were() -> None:
    grams = {name: gram.double() for name, gram in grams_of("ab", 2).items()}
    before = {name: gram.clone() for name, gram in grams.items()}
    regmean(TOY, context=context(2), evidence=grams)
    assert all(torch.equal(gram, before[name]) for name, gram in grams.items())


def test_directions_without_inputs_are_averaged() -> None:
    factors = [draw_factors(6, 5, 2, seed) for seed in range(2)]
    grams = {f"gram.{task}": torch.diag(torch.tensor([1.0, 2, 3, 0, 0])) for task in "ab"}
    found = dense(regmean(factors, context=context(2), evidence=grams))
    assert_close(found, (factors[0].delta() + factors[1].delta()) / 2)


def test_an_absent_task_pulls_towards_no_change_where_its_inputs_lie() -> None:
    factors = [draw_factors(6, 5, 2, seed) for seed in range(2)]
    grams = grams_of("abc", 5)
    zero = LoRAFactors(torch.zeros(1, 5), torch.zeros(6, 1))
    absent = dense(regmean(factors, context=context("ab", "abc"), evidence=grams))
    filled = dense(regmean([*factors, zero], context=context("abc"), evidence=grams))
    assert_close(absent, filled)
    del grams["gram.c"]
    two = dense(regmean(factors, context=context("ab"), evidence=grams))
    left_out = dense(regmean(factors, context=context("ab", "abc"), evidence=grams))
    assert_close(left_out, two)


@pytest.mark.parametrize(
    "evidence", [None, {}, {"gram.a": torch.zeros(5, 5), "gram.b": torch.zeros(5, 5)}]
)
def test_a_module_without_grams_is_averaged(evidence) -> None:
    factors = [draw_factors(6, 5, 2, seed) for seed in range(2)]
    found = dense(regmean(factors, context=context("ab", "abc"), evidence=evidence, scale=0.5))
    assert_close(found, (factors[0].delta() + factors[1].delta()) / 6)


def forms(tasks: str, d_in: int) -> tuple[dict, dict]:
    """Grams by two directions and a diagonal, and the same as wholes."""
    draw = torch.Generator().manual_seed(0)
    less, whole = {}, {}
    for task in tasks:
        root, diagonal = torch.randn(2, d_in, generator=draw), torch.rand(d_in, generator=draw)
        less |= {f"gram_root.{task}": root, f"gram_diagonal.{task}": diagonal}
        whole[f"gram.{task}"] = root.T @ root + torch.diag(diagonal)
    return less, whole


@pytest.mark.parametrize("d_in", [4, 24], ids=["more directions than features", "fewer"])
@pytest.mark.parametrize("rho", [0.9, 1.0])
def test_directions_and_a_diagonal_are_the_gram_they_stand_for(d_in: int, rho: float) -> None:
    factors = [draw_factors(6, d_in, 2, seed) for seed in range(3)]
    less, whole = forms("abcd", d_in)
    about = context("abc", "abcd")
    found = dense(regmean(factors, context=about, evidence=less, rho=rho))
    assert_close(found, dense(regmean(factors, context=about, evidence=whole, rho=rho)))


def test_a_diagonal_is_a_diagonal_gram() -> None:
    factors = [draw_factors(6, 5, 2, seed) for seed in range(2)]
    rows = torch.tensor([[1.0, 2, 3, 4, 0], [2.0, 1, 0, 1, 0]])
    less = {f"gram_diagonal.{task}": row for task, row in zip("ab", rows, strict=True)}
    whole = {f"gram.{task}": torch.diag(row) for task, row in zip("ab", rows, strict=True)}
    found = dense(regmean(factors, context=context(2), evidence=less))
    assert_close(found, dense(regmean(factors, context=context(2), evidence=whole)))


def test_what_is_wrong_with_grams_is_said() -> None:
    factors = [draw_factors(6, 5, 2, seed) for seed in range(2)]
    told = context(2)
    with pytest.raises(InputError, match=r"m\.gram: none for b but for a"):
        regmean(factors, context=told, evidence=grams_of("a", 5))
    with pytest.raises(InputError, match=r"m\.gram\.a: \(4, 4\) but \(5, 5\)"):
        regmean(factors, context=told, evidence=grams_of("ab", 4))
    with pytest.raises(InputError, match=r"m\.gram_root\.a: \(2, 4\) but \(2, 5\)"):
        regmean(factors, context=told, evidence=forms("ab", 4)[0])
    singular = {f"gram.{task}": torch.ones(5, 5) for task in "ab"}
    with pytest.raises(InputError, match=r"m: the Gram matrices .* Set params\.ridge above 0"):
        regmean(factors, context=told, evidence=singular, ridge=0.0)
