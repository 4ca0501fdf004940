"""EMR beside its definition on dense deltas."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import icm_ray
from icm_ray.types import Adapter, LoRAFactors

SHAPES = {"l.0": (12, 9), "l.1": (5, 14)}


@pytest.fixture
def three(make_adapter) -> list[Adapter]:
    """Unequal ranks; task c lacks l.0."""
    return [
        make_adapter("a", shapes=SHAPES, rank=2, scaling=2.0),
        make_adapter("b", shapes=SHAPES, rank=3),
        make_adapter("c", shapes={"l.1": SHAPES["l.1"]}, rank=1, scaling=0.5),
    ]


def of_rank_one(row: Sequence[float], column: Sequence[float]) -> dict[str, LoRAFactors]:
    return {"m": LoRAFactors(torch.tensor([row]), torch.tensor(column)[:, None])}


def by_definition(
    adapters: Sequence[Adapter], preset: str
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    unified: dict[str, Tensor] = {}
    masks: dict[str, dict[str, Tensor]] = {x.name: {} for x in adapters}
    own, masked = (dict.fromkeys(masks, 0.0) for _ in range(2))
    for module, shape in SHAPES.items():
        deltas = {x.name: x.modules[module].delta() for x in adapters if module in x.modules}
        sign = torch.where(sum(deltas.values()) > 0, 1.0, -1.0)
        agreeing = torch.stack([(delta * sign).clamp(min=0) for delta in deltas.values()])
        unified[module] = agreeing.amax(0) * sign
        for task, delta in deltas.items():
            masks[task][module] = delta * sign > 0
            kept = unified[module][masks[task][module]].abs().double()
            entries = shape[0] * shape[1] if preset == "code" else 1
            own[task] += float(delta.abs().double().sum()) / entries
            masked[task] += float(kept.sum()) / entries
    tasks = {
        task: {m: mask * unified[m] * own[task] / masked[task] for m, mask in of_task.items()}
        for task, of_task in masks.items()
    }
    return unified, tasks


@pytest.mark.parametrize("preset", ["code", "paper"])
def test_emr_is_its_definition(three, preset: str) -> None:
    unified, tasks = by_definition(three, preset)
    result = icm_ray.merge(three, "emr", params={"preset": preset}, output_rank="exact")
    for module, expected in unified.items():
        found = result.adapter.modules[module].delta()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert set(result.per_task) == {"a", "b", "c"}
    for task, modules in tasks.items():
        assert set(result.per_task[task].modules) == set(modules)
        for module, expected in modules.items():
            found = result.per_task[task].modules[module].delta()
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_presets_differ_where_modules_differ_in_size(three) -> None:
    one, two = (icm_ray.merge(three, "emr", params={"preset": p}) for p in ("code", "paper"))
    assert one.adapter.fingerprint == two.adapter.fingerprint
    assert one.per_task["a"].fingerprint != two.per_task["a"].fingerprint


def test_two_rank_one_adapters_by_hand(adapter_around) -> None:
    pair = [
        adapter_around("a", of_rank_one([2.0, 1.0], [1.0, 0.0])),
        adapter_around("b", of_rank_one([-1.0, 2.0], [1.0, 1.0])),
    ]
    result = icm_ray.merge(pair, "emr", output_rank="exact")
    unified = torch.tensor([[2.0, 2.0], [-1.0, 2.0]])
    torch.testing.assert_close(result.adapter.modules["m"].delta(), unified)
    of_a, of_b = (result.per_task[task].modules["m"].delta() for task in "ab")
    torch.testing.assert_close(of_a, 0.75 * torch.tensor([[2.0, 2.0], [0.0, 0.0]]))
    torch.testing.assert_close(of_b, 1.2 * torch.tensor([[0.0, 2.0], [-1.0, 2.0]]))


def test_where_deltas_cancel_the_sign_is_negative(adapter_around) -> None:
    pair = [
        adapter_around("a", of_rank_one([1.0, -2.0], [1.0])),
        adapter_around("b", of_rank_one([-1.0, 2.0], [1.0])),
    ]
    result = icm_ray.merge(pair, "emr", output_rank="exact")
    torch.testing.assert_close(result.adapter.modules["m"].delta(), torch.tensor([[-1.0, -2.0]]))


def test_a_task_without_overlap_keeps_nothing_and_divides_nothing(adapter_around) -> None:
    pair = [
        adapter_around("a", of_rank_one([1.0, 2.0], [3.0])),
        adapter_around("b", of_rank_one([-1.0, -2.0], [1.0])),
    ]
    result = icm_ray.merge(pair, "emr", output_rank="exact")
    assert not result.per_task["b"].modules["m"].delta().any()
    one = icm_ray.merge(pair[:1], "emr", output_rank="exact")
    for adapter in (one.adapter, one.per_task["a"]):
        torch.testing.assert_close(adapter.modules["m"].delta(), pair[0].modules["m"].delta())
