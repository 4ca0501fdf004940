"""Rows to their own adapters: the product is PEFT's, and nothing is routed on a guess."""

import pytest
import torch
from torch import Tensor, nn

from icm_ray.base_model.readers import Batch, pad_batch
from icm_ray.errors import RecipeError
from icm_ray.finetuning.routing import MOST_PADDING, passes, routed

NAMES = ("task0", "task1", "task2")


class Mixed(nn.Module):
    """A linear layer behind another, which may see the tokens of all rows in one."""

    def __init__(self, flat: bool = False) -> None:
        super().__init__()
        self.flat, self.first, self.last = flat, nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        return self.last(hidden.flatten(0, 1) if self.flat else hidden)


def adapted(targets: list[str], names: tuple[str, ...] = NAMES, **options):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(Mixed(**options), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    return model.eval()


@pytest.mark.parametrize("order", [NAMES, ("task2", "task0")])
def test_every_row_meets_its_own_adapter(order: tuple[str, ...]) -> None:
    model = adapted(["first", "last"])
    x = torch.randn(2 * len(order), 4, 5)
    expected = []
    for name, own in zip(order, x.split(2), strict=True):
        model.set_adapter(name)
        expected.append(model(own))
    with routed(model, order, len(x)):
        found = model(x)
    torch.testing.assert_close(found, torch.cat(expected))
    torch.testing.assert_close(model(x[:2]), model(x)[:2])  # PEFT's own forward is back


def test_a_single_adapter_runs_as_peft_runs_it() -> None:
    model, x = adapted(["first"], NAMES[:1]), torch.randn(4, 3, 5)
    expected = model(x)
    with routed(model, NAMES[:1], 99):
        assert torch.equal(model(x), expected)


def test_a_layer_that_sees_other_rows_is_refused() -> None:
    model = adapted(["last"], flat=True)
    with (
        pytest.raises(RecipeError, match=r"last sees 24 rows of a batch of 6.*Set it to 1"),
        routed(model, NAMES, 6),
    ):
        model(torch.randn(6, 4, 5))
    assert all("forward" not in vars(part) for part in model.modules())


def batch_of(width: int) -> Batch:
    return pad_batch([[1] * width, [1]], [0, 1], 0)


def test_batches_share_a_pass_while_little_is_padded() -> None:
    widths = {"a": 16, "b": 40, "c": 16, "d": 17, "e": 38, "f": 80}
    found = passes({name: batch_of(width) for name, width in widths.items()})
    assert [list(group) for group in found] == [["a", "c", "d"], ["e", "b"], ["f"]]
    for group in found:
        own = [widths[name] for name in group]
        assert max(own) * len(own) <= MOST_PADDING * sum(own)
