"""Latent averaging against principal components of dense, flattened adapters."""

import pytest
import torch
from factor_samples import assert_close, check, context, dense, draw_factors, for_any_stack, stacks
from hypothesis import given
from hypothesis import strategies as st

from icm_ray.methods.svd_latent import passes, svd_latent
from icm_ray.types import LoRAFactors, ModuleContext

Adapters = dict[str, dict[str, LoRAFactors]]


def merged(adapters: Adapters, **params) -> dict[str, torch.Tensor]:
    """Return the merged deltas of adapters given by task and module, the pass included."""
    everyone = tuple(sorted(adapters))
    modules = sorted({module for one in adapters.values() for module in one})
    contexts, inputs = {}, {}
    for module in modules:
        present = tuple(task for task in everyone if module in adapters[task])
        contexts[module] = ModuleContext(module, present, everyone)
        inputs[module] = [adapters[task][module] for task in present]
    params = {"components": None, "space": "factors", **params}
    (one,) = passes(**params)
    total: dict[str, torch.Tensor] = {}
    for module in modules:
        measured = one.measure(inputs[module], context=contexts[module], **params)
        for name, value in measured.items():
            total[name] = total.get(name, 0) + value
    found = one.conclude(total, tasks=everyone, **params)
    return {
        module: dense(
            svd_latent(
                inputs[module], context=ModuleContext(module, c.tasks, everyone, 0, found), **params
            )
        )
        for module, c in contexts.items()
    }


def of_one_module(factors: list[LoRAFactors], *, context: ModuleContext, **params) -> LoRAFactors:
    params = {"components": None, "space": "factors", **params}
    (one,) = passes(**params)
    total = one.measure(factors, context=context, **params)
    found = one.conclude(total, tasks=context.all_tasks, **params)
    told = ModuleContext(context.module, context.tasks, context.all_tasks, 0, found)
    return svd_latent(factors, context=told, **params)


def two_modules(ranks: dict[str, int]) -> Adapters:
    return {
        task: {"m": draw_factors(9, 7, rank, seed=i), "n": draw_factors(6, 8, rank, seed=50 + i)}
        for i, (task, rank) in enumerate(ranks.items())
    }


def canonical(f: LoRAFactors, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    u, s, vh = torch.linalg.svd(f.b.double() @ f.a.double(), full_matrices=False)
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    signs = torch.stack([row[row.abs().argmax()].sign() for row in vh])
    return u * s.sqrt() * signs, (s.sqrt() * signs)[:, None] * vh


def coefficients(x: torch.Tensor, kept: int) -> torch.Tensor:
    """Return how much of each row is in the mean of the rows' projections on components."""
    u, _, _ = torch.linalg.svd(x, full_matrices=False)
    return u[:, :kept] @ u[:, :kept].mean(0)


@pytest.mark.parametrize("space", ["factors", "delta"])
def test_what_every_merge_promises(space: str) -> None:
    @for_any_stack
    def promises(factors: list[LoRAFactors]) -> None:
        check(lambda f, **told: of_one_module(f, space=space, **told), factors)

    promises()


@pytest.mark.parametrize("space", ["factors", "delta"])
@given(stacks(), st.sampled_from([None, 1, 5]))
def test_one_adapter_comes_back(space: str, factors: list[LoRAFactors], components) -> None:
    told = context(1)
    found = of_one_module(factors[:1], context=told, space=space, components=components)
    assert_close(dense(found), factors[0].delta())


@pytest.mark.parametrize(("components", "kept"), [(None, 2), (1, 1), (3, 3), (4, 4), (9, 4)])
def test_delta_space_is_the_mean_inside_the_principal_components(components, kept: int) -> None:
    adapters = two_modules({"a": 2, "b": 1, "c": 4, "d": 3})
    x = [
        torch.cat([f.delta().double().flatten() for f in one.values()]) for one in adapters.values()
    ]
    c = coefficients(torch.stack(x), kept)
    found = merged(adapters, space="delta", components=components)
    for module in ("m", "n"):
        parts = [w * one[module].delta() for w, one in zip(c, adapters.values(), strict=True)]
        assert_close(found[module], sum(parts).float())


@pytest.mark.parametrize(("components", "kept"), [(None, 2), (1, 1), (4, 4)])
def test_factor_space_pads_ranks_and_multiplies_the_sums(components, kept: int) -> None:
    adapters = two_modules({"a": 2, "b": 1, "c": 4, "d": 3})
    ranks = {task: one["m"].rank for task, one in adapters.items()}
    flat, padded = [], {}
    for task, one in adapters.items():
        for module, f in one.items():
            b, a = canonical(f, ranks[task])
            gap = 4 - ranks[task]
            padded[task, module] = (
                torch.nn.functional.pad(b, (0, gap)),
                torch.nn.functional.pad(a, (0, 0, 0, gap)),
            )
        flat.append(torch.cat([t.flatten() for m in ("m", "n") for t in padded[task, m]]))
    c = coefficients(torch.stack(flat), kept)
    found = merged(adapters, components=components)
    for module in ("m", "n"):
        b, a = (
            sum(w * padded[task, module][i] for w, task in zip(c, adapters, strict=True))
            for i in (0, 1)
        )
        assert_close(found[module], (b @ a).float())


def test_all_components_of_deltas_are_the_soup() -> None:
    adapters = two_modules({"a": 2, "b": 3, "c": 1})
    found = merged(adapters, space="delta", components=3)
    for module in ("m", "n"):
        assert_close(found[module], sum(one[module].delta() for one in adapters.values()) / 3)


def test_a_module_of_few_tasks_is_averaged_with_the_coefficients_of_all() -> None:
    adapters = two_modules({"a": 2, "b": 3, "c": 1})
    del adapters["b"]["n"]
    zeros = LoRAFactors(torch.zeros(1, 8), torch.zeros(6, 1))
    filled = {**adapters, "b": {**adapters["b"], "n": zeros}}
    for space in ("factors", "delta"):
        found, expected = merged(adapters, space=space), merged(filled, space=space)
        for module in ("m", "n"):
            assert_close(found[module], expected[module])


def test_the_split_of_a_delta_does_not_matter() -> None:
    adapters = two_modules({"a": 2, "b": 3, "c": 3})
    draw = torch.Generator().manual_seed(9)
    mixed: Adapters = {}
    for task, one in adapters.items():
        mixed[task] = {}
        for module, f in one.items():
            g = torch.linalg.qr(torch.randn(f.rank, f.rank, generator=draw))[0] * 3
            mixed[task][module] = LoRAFactors(g @ f.a, f.b @ torch.linalg.inv(g))
    for space in ("factors", "delta"):
        found, expected = merged(mixed, space=space), merged(adapters, space=space)
        for module in ("m", "n"):
            assert_close(found[module], expected[module])
