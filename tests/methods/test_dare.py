"""Methods that drop entries by chance: draws, recorded masks, and PEFT's rule for A and B."""

import pytest
import torch
from elementwise_samples import (
    DELTA,
    FACTORS,
    Experts,
    combined,
    dense,
    masks,
    merged,
    three_experts,
)
from torch import Tensor

from icm_ray import InputError, RecipeError
from icm_ray.linalg import blocks
from icm_ray.linalg.sparsify import largest, threshold
from icm_ray.types import LoRAFactors

three = pytest.fixture(three_experts, name="three")
DROPPING = [("dare", {}), ("dare_ties", {}), ("dare_ties", {"preset": "nsc"}), ("della", {})]


@pytest.mark.parametrize(("method", "params"), DROPPING)
def test_draws_do_not_depend_on_the_blocks(monkeypatch, method: str, params: dict) -> None:
    generator = torch.Generator().manual_seed(0)

    def whole_numbers(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).float()

    experts = {t: {"m": LoRAFactors(whole_numbers(2, 40), whole_numbers(30, 2))} for t in "ab"}
    first = merged(method, experts, density=0.5, **params)["m"]
    for rows in (1, 7, 29):
        monkeypatch.setattr(blocks, "block_rows", lambda *_, rows=rows: rows)
        assert torch.equal(merged(method, experts, density=0.5, **params)["m"], first)
    assert not torch.equal(merged(method, experts, density=0.5, seed=1, **params)["m"], first)


def test_draws_differ_by_task_and_module() -> None:
    ones = LoRAFactors(torch.ones(1, 50), torch.ones(20, 1))
    found = [merged("dare", {t: {m: ones}}, density=0.5)[m] for t, m in ("am", "bm", "an")]
    assert not any(torch.equal(found[0], other) for other in found[1:])
    assert set(found[0].unique().tolist()) == {0.0, 2.0}


def test_masks_are_obeyed(three) -> None:
    told = masks(three, DELTA)
    found = merged("dare", three, density=0.6, scale=0.5, evidence=told)
    elected = merged("dare_ties", three, density=0.6, evidence=told)
    for module, values in dense(three).items():
        mask = torch.stack([told[module][f"mask.{task}"] for task in sorted(three)])
        kept = values * mask / 0.6
        torch.testing.assert_close(found[module], 0.5 * kept.sum(0))
        expected = combined(kept, kept.sum(0), 1, torch.ones(3, 1, 1), "count")
        torch.testing.assert_close(elected[module], expected)


def test_nsc_trims_before_it_drops_and_the_original_after(three) -> None:
    told = masks(three, DELTA)
    params = {"density": 0.6, "trim_density": 0.5, "aggregate": "mean", "evidence": told}
    nsc = merged("dare_ties", three, preset="nsc", **params)
    ours = merged("dare_ties", three, **params)
    ones, dropped = torch.ones(3, 1, 1), {}
    for module, values in dense(three).items():
        mask = torch.stack([told[module][f"mask.{task}"] for task in sorted(three)])
        top = torch.stack([largest(v, round(v.numel() * 0.5)) for v in values])
        kept = torch.where(top, values, 0.0) * mask / 0.6
        expected = combined(kept, kept.sign().sum(0), 1, ones, "count")
        torch.testing.assert_close(nsc[module], expected)
        dropped[module] = values * mask / 0.6
    flat = torch.cat([v.flatten(1) for v in dropped.values()], dim=1)
    least = torch.tensor([threshold(row, 0.5) for row in flat])[:, None, None]
    for module, values in dropped.items():
        kept = torch.where(values.abs() >= least, values, 0.0)
        expected = combined(kept, kept.sum(0), 1, ones, "count")
        torch.testing.assert_close(ours[module], expected)


@pytest.fixture
def equal_ranks(make_adapter) -> Experts:
    shapes, scalings = {"m": (6, 5), "n": (3, 7)}, (2.0, 0.5, 0.0)
    made = [
        make_adapter(name, shapes=shapes, rank=2, scaling=s)
        for name, s in zip("abc", scalings, strict=True)
    ]
    return {adapter.name: adapter.modules for adapter in made}


@pytest.mark.parametrize("method", ["ties", "dare", "dare_ties", "magnitude_prune"])
def test_peft_merges_the_factors_apart(equal_ranks, method: str) -> None:
    weights = [0.5, -2.0, 1.0]
    told = masks(equal_ranks, FACTORS) if "dare" in method else {}
    params = {"density": 0.6, "preset": "peft", "weights": weights, "scale": 3.0}
    found = merged(method, equal_ranks, evidence=told, **params)
    signed = [w * s for w, s in zip(weights, (2.0, 0.5, 0.0), strict=True)]
    on_b = torch.tensor(signed).abs().sqrt()[:, None, None]
    on_a = on_b * torch.tensor(signed).sign()[:, None, None]

    def side(values: Tensor, numbers: Tensor, masks: list[Tensor]) -> Tensor:
        if masks:
            values = values * torch.stack(masks) / 0.6
        else:
            count = int(0.6 * values[0].numel())
            values = torch.where(torch.stack([largest(v, count) for v in values]), values, 0.0)
        if "ties" in method:
            return combined(values, values.sum(0), 1, numbers, "count")
        return (values * numbers).sum(0)

    for module in found:
        factors = [equal_ranks[task][module] for task in "abc"]
        own = told.get(module, {})
        a = side(
            torch.stack([f.a for f in factors]),
            on_a,
            [own[f"mask_a.{t}"] for t in "abc" if own],
        )
        b = side(
            torch.stack([f.b / (f.scaling or 1.0) for f in factors]),
            on_b,
            [own[f"mask_b.{t}"] for t in "abc" if own],
        )
        torch.testing.assert_close(found[module], 3.0 * b @ a)


@pytest.mark.parametrize("method", ["ties", "dare", "dare_ties", "magnitude_prune"])
def test_unequal_ranks_are_refused_where_factors_are_merged_apart(three, method: str) -> None:
    with pytest.raises(InputError, match=r"module m: ranks \[2, 3, 1\] but equal ranks"):
        merged(method, three, preset="peft")


def test_masks_that_do_not_fit_are_refused(three) -> None:
    told = masks(three, DELTA)
    told["m"]["mask.b"] = torch.ones(2, 2)
    with pytest.raises(InputError, match=r"m.mask.b is \(2, 2\) but \(12, 9\) is expected"):
        merged("dare", three, evidence=told)
    with pytest.raises(InputError, match=r"m.mask.a is missing"):
        merged("dare", three, evidence={"m": {"mask_a.a": torch.ones(2, 9)}})


def test_parameters_that_would_do_nothing_are_refused(three) -> None:
    with pytest.raises(RecipeError, match="preset 'peft_svd' trims nothing"):
        merged("dare_ties", three, preset="peft_svd", trim_density=0.5)
    with pytest.raises(RecipeError, match="less than twice the density"):
        merged("della", three, density=0.1, epsilon=0.2)


def test_della_keeps_large_entries_more_often_and_the_mean() -> None:
    row = torch.arange(1.0, 11.0)[None]
    experts = {"a": {"m": LoRAFactors(row, torch.ones(3000, 1))}}
    found = merged("della", experts, density=0.5, epsilon=0.4)["m"]
    kept = (found != 0).float().mean(0)
    expected = 0.5 + 0.4 * (0.5 - torch.arange(10).flip(0) / 10)
    torch.testing.assert_close(kept, expected, rtol=0, atol=0.05)
    torch.testing.assert_close(found.mean(0) / row[0], torch.ones(10), rtol=0, atol=0.1)
