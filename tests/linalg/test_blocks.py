import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from icm_ray.linalg import blocks
from icm_ray.linalg.blocks import block_rows, row_blocks


def products(tasks: int, d_out: int, d_in: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(7)
    ranks = [k % 3 for k in range(tasks)]  # one of rank zero
    return [
        (torch.randn(d_out, r, generator=draw), torch.randn(r, d_in, generator=draw)) for r in ranks
    ]


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 7), st.integers(1, 9))
def test_blocks_are_the_products_from_top_to_bottom(tasks, d_out, d_in, rows) -> None:
    pairs = products(tasks, d_out, d_in)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "block_rows", lambda *_: rows)
        found = [block.clone() for block in row_blocks(pairs)]
    assert all(block.is_contiguous() for block in found)
    assert [block.shape[1] for block in found[:-1]] == [rows] * (len(found) - 1)
    torch.testing.assert_close(torch.cat(found, dim=1), torch.stack([b @ a for b, a in pairs]))


def test_every_sweep_gives_the_same_bits() -> None:
    pairs = products(4, 300, 200)
    first = [block.clone() for block in row_blocks(pairs)]
    assert all(torch.equal(a, b) for a, b in zip(first, row_blocks(pairs), strict=True))


def test_a_block_stays_small_and_has_more_than_a_row() -> None:
    assert block_rows(4096, 6) * 4096 * 6 * 4 <= 4 * 2**20
    assert block_rows(4096, 512) >= 4
    assert block_rows(1, 1) >= 1
