"""Shared bases: exact where there are some, a fixed point of both steps, better than a start."""

import torch

from icm_ray.linalg.tucker import shared_bases

DRAW = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=DRAW)


def kept(m: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> float:
    return float((u.T @ m @ v).square().sum())


def leading(stack: torch.Tensor, rank: int) -> torch.Tensor:
    return torch.linalg.svd(stack, full_matrices=False).U[:, :rank]


def test_matrices_between_shared_bases_are_kept_whole() -> None:
    u, v = torch.linalg.qr(random(9, 3)).Q, torch.linalg.qr(random(7, 3)).Q
    matrices = u @ random(4, 3, 3) @ v.T
    found = shared_bases(matrices, 3)
    torch.testing.assert_close(found[0] @ found[0].T, u @ u.T)
    torch.testing.assert_close(found[1] @ found[1].T, v @ v.T)


def test_neither_basis_can_be_bettered_alone_and_both_better_the_start() -> None:
    matrices = random(4, 9, 7)
    u, v = shared_bases(matrices, 3)
    torch.testing.assert_close(u.T @ u, torch.eye(3, dtype=u.dtype))
    torch.testing.assert_close(v.T @ v, torch.eye(3, dtype=v.dtype))
    side_by_side = torch.cat(list(matrices @ v), 1)
    again = leading(side_by_side, 3)
    torch.testing.assert_close(again @ again.T, u @ u.T, rtol=0, atol=1e-5)
    starts = (leading(torch.cat(list(m), 1), 3) for m in (matrices, matrices.mT))
    assert kept(matrices, u, v) > kept(matrices, *starts)


def test_columns_come_by_strength() -> None:
    matrices = random(3, 6, 8)
    u, v = shared_bases(matrices, 4)
    for strengths in ((matrices.mT @ u).norm(dim=(0, 1)), (matrices @ v).norm(dim=(0, 1))):
        assert torch.equal(strengths.argsort(descending=True), torch.arange(4))


def test_a_side_shorter_than_the_rank_is_taken_whole() -> None:
    u, v = shared_bases(random(2, 3, 5), 4)
    assert (u.shape, v.shape) == ((3, 3), (5, 4))
