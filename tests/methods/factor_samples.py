"""Adapters of one module, good and bad ones, and what holds for every merge of them."""

from collections.abc import Callable, Sequence

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icm_ray.types import Delta, LoRAFactors, ModuleContext

Merge = Callable[..., LoRAFactors | Delta]

# The toy: deltas [[2, 1], [0, 0]] and [[-1, 2], [-1, 2]].
TOY = [
    LoRAFactors(torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0], [0.0]])),
    LoRAFactors(torch.tensor([[-1.0, 2.0]]), torch.tensor([[1.0], [1.0]])),
]


def context(present: Sequence[str] | int, everyone: Sequence[str] | None = None) -> ModuleContext:
    """Return the context of a module; tasks are called a, b, c and so on."""
    names = tuple("abcdefgh"[:present]) if isinstance(present, int) else tuple(present)
    return ModuleContext("m", names, tuple(everyone or names))


def draw_factors(
    d_out: int, d_in: int, rank: int, seed: int = 0, scaling: float = 1.0
) -> LoRAFactors:
    """Return random factors with the scaling folded in."""
    draw = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, d_in, generator=draw)
    return LoRAFactors(a, torch.randn(d_out, rank, generator=draw) * scaling, scaling)


@st.composite
def stacks(draw: st.DrawFn) -> list[LoRAFactors]:
    """Draw one to four adapters of a small layer: wide, repeated, deficient, zero or empty ones."""
    d_out, d_in, seed = draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(st.integers(0, 99))
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=1, max_size=4))
    made: list[LoRAFactors] = []
    for place, kind in enumerate(kinds):
        rank, scaling = draw(st.integers(1, 9)), draw(st.sampled_from([1.0, 0.25, 3.0]))
        one = draw_factors(d_out, d_in, rank, 10 * seed + place, scaling)
        if kind == "repeated" and made:
            one = made[-1]
        elif kind == "deficient":
            one = LoRAFactors(one.a[[0] * rank], one.b, scaling)
        elif kind == "zero":
            one = LoRAFactors(one.a, torch.zeros_like(one.b), scaling)
        elif kind == "empty":
            one = LoRAFactors(one.a[:0], one.b[:, :0], scaling)
        made.append(one)
    return made


KINDS = ("any", "any", "any", "repeated", "deficient", "zero", "empty")


def for_any_stack(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test on stacks of every kind."""
    return settings(max_examples=40)(given(stacks())(test))


def dense(result: LoRAFactors | Delta) -> torch.Tensor:
    return result.delta() if isinstance(result, LoRAFactors) else result.dense()


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    atol = 2e-5 * max(float(expected.abs().max()), 1e-30)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=atol)


def check(
    merge: Merge, factors: list[LoRAFactors], *, homogeneous: bool = True, gauge_free: bool = True
) -> None:
    """Assert what every merge of these adapters promises."""
    told = context(len(factors))
    before = [(f.a.clone(), f.b.clone()) for f in factors]
    result = merge(factors, context=told)
    found = dense(result)
    assert found.shape == factors[0].shape
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    for f, (a, b) in zip(factors, before, strict=True):
        assert torch.equal(f.a, a)
        assert torch.equal(f.b, b)
    assert_own_memory(result, factors)
    assert torch.equal(dense(merge(factors, context=told)), found)

    nothing = [LoRAFactors(f.a, torch.zeros_like(f.b), f.scaling) for f in factors]
    assert torch.equal(dense(merge(nothing, context=told)), torch.zeros(found.shape))

    rank = max(f.rank for f in factors) + 1
    zero = LoRAFactors(torch.zeros(rank, found.shape[1]), torch.zeros(found.shape[0], rank))
    everyone = ["_", *told.tasks]
    absent = merge(factors, context=context(told.tasks, everyone))
    assert_close(dense(merge([zero, *factors], context=context(everyone))), dense(absent))

    if homogeneous:
        larger = [LoRAFactors(f.a, f.b * 8, f.scaling * 8) for f in factors]
        assert_close(dense(merge(larger, context=told)), 8 * found)
    if gauge_free:
        other = [
            LoRAFactors(f.a * 2.0**p, f.b / 2.0**p, f.scaling) for p, f in enumerate(factors, 1)
        ]
        assert_close(dense(merge(other, context=told)), found)


def assert_own_memory(result: LoRAFactors | Delta, factors: Sequence[LoRAFactors]) -> None:
    if isinstance(result, Delta):
        return
    taken = {t.untyped_storage().data_ptr() for f in factors for t in (f.a, f.b) if t.numel()}
    for tensor in (result.a, result.b):
        assert not tensor.numel() or tensor.untyped_storage().data_ptr() not in taken
