"""ESM's directions are those of the output shifts, and its factors are squares of norms."""

import torch
from factor_samples import assert_close, check, draw_factors, for_any_stack
from test_regmean import forms, grams_of

import icm_ray
from icm_ray.methods.esm import esm, passes
from icm_ray.methods.shared.trim import of_module_alone
from icm_ray.types import LoRAFactors, ModuleContext


def alone(factors: list[LoRAFactors], *, context: ModuleContext, preset: str = "vit"):
    """Merge a module that is the only one of its type."""
    told = grams_of(context.all_tasks, factors[0].shape[1])
    context = of_module_alone(passes(), factors, context, told, preset=preset)
    return esm(factors, context=context, evidence=told, preset=preset)


@for_any_stack
def test_what_every_merge_promises(factors: list[LoRAFactors]) -> None:
    check(alone, factors)


@for_any_stack
def test_and_without_its_paper_s_scaling(factors: list[LoRAFactors]) -> None:
    check(lambda given, *, context: alone(given, context=context, preset="roberta"), factors)


def merged(adapters, **grams: torch.Tensor) -> dict[str, torch.Tensor]:
    result = icm_ray.merge(adapters, "esm", params={"preset": "roberta"}, evidence=grams)
    return {module: factors.delta() for module, factors in result.adapter.modules.items()}


def test_inputs_say_which_directions_are_joined(adapter_around) -> None:
    """Of two directions that one task has room for, the one that its inputs move is kept."""
    one = LoRAFactors(torch.eye(2), torch.eye(2))
    two = LoRAFactors(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0], [0.0]]))
    adapters = [adapter_around("a", {"m": one}), adapter_around("b", {"m": two})]
    grams = {"m.gram.a": torch.diag(torch.tensor([1.0, 9.0])), "m.gram.b": torch.eye(2)}
    assert_close(merged(adapters, **grams)["m"], torch.eye(2))
    grams["m.gram.a"] = torch.diag(torch.tensor([9.0, 1.0]))
    found = merged(adapters, **grams)["m"]
    assert float(found[1].abs().max()) < 1e-6


def test_modules_that_differ_in_numbers_only_share_a_mean(adapter_around) -> None:
    f = draw_factors(6, 5, 2)
    grown = LoRAFactors(f.a, 3 * f.b)
    adapters = [adapter_around("a", {"l.0.q": f, "l.1.q": grown, "l.1.v": grown})]
    grams = {f"{m}.gram.a": torch.eye(5) for m in ("l.0.q", "l.1.q", "l.1.v")}
    found = merged(adapters, **grams)
    # Norms 1 and 3 have a mean of 2: factors of 1/4 and 9/4, where a module alone has 1.
    assert_close(found["l.1.q"], 27 * found["l.0.q"])
    assert_close(found["l.1.v"], 4 / 9 * found["l.1.q"])


def test_directions_and_a_diagonal_are_the_gram_they_stand_for(make_adapter) -> None:
    adapters = [make_adapter(name, shapes={"m": (6, 8)}) for name in "ab"]
    less, whole = ({f"m.{n}": x for n, x in told.items()} for told in forms("ab", 8))
    assert_close(merged(adapters, **less)["m"], merged(adapters, **whole)["m"])
