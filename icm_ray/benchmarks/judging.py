"""How far merged layers are off: from the truth, from the peer, from the best a cut can do."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from icm_ray.benchmarks.comparisons import Comparison
from icm_ray.benchmarks.peers import DENSITY, Found, Merged
from icm_ray.types import Adapter


def judge(
    comparison: Comparison,
    adapters: Sequence[Adapter],
    rank: int,
    uncut: Callable[[], Found],
    results: Mapping[str, Found],
) -> dict[str, float | None]:
    """Return each side's error of its worst layer; see `Measured.judged`.

    Args:
        comparison: Says by what results are judged.
        adapters: What was merged.
        rank: That results were cut to.
        uncut: Makes our result before the cut, dense, by layer.
        results: Every side's result.
    """
    if comparison.judged in ("truth", "peer"):
        is_true = comparison.judged == "truth"
        cut = rank if comparison.result == "cut" else None
        truth = true_merge(adapters, cut) if is_true else None
        expected = truth or results[comparison.peer]
        return {
            side: max(distance(merged[layer], expected[layer]) for layer in merged)
            if is_true or side != comparison.peer
            else None
            for side, merged in results.items()
        }
    if comparison.judged == "noise":
        return {side: _noise(merged, adapters) for side, merged in results.items()}
    judged = [side for side in results if not (comparison.draws and side == comparison.peer)]
    worst: dict[str, float | None] = dict.fromkeys(results)
    for layer, whole in uncut().items():
        dense = as_matrix(whole).double()
        best = _best_residual(dense, rank)
        for side in judged:
            over = float((dense - as_matrix(results[side][layer])).norm() / dense.norm()) - best
            worst[side] = max(over, worst[side] or -1.0)
    return worst


def as_matrix(merged: Merged) -> Tensor:
    """Return a layer's result as a matrix."""
    return merged if isinstance(merged, Tensor) else merged[0] @ merged[1]


def distance(found: Merged, expected: Merged) -> float:
    """Return `|found - expected| / |expected|` in the Frobenius norm."""
    if isinstance(found, tuple) and isinstance(expected, tuple):
        return relative_error(found, expected)
    matrix = as_matrix(expected).double()
    return float((as_matrix(found) - matrix).norm() / matrix.norm())


def _best_residual(dense: Tensor, rank: int) -> float:
    """Return the relative residual of the best matrix of this rank (Eckart-Young), in float64."""
    short = dense if dense.shape[0] <= dense.shape[1] else dense.T
    squares = torch.linalg.eigvalsh(short @ short.T).flip(0).clamp(min=0)
    return float((squares[rank:].sum() / squares.sum()).sqrt())


def _noise(found: Found, adapters: Sequence[Adapter]) -> float:
    """Return the distance to the mean merge over that of masks which keep `DENSITY` of entries."""
    shares = []
    for layer, merged in found.items():
        deltas = [adapter.modules[layer].delta() for adapter in adapters]
        mean = torch.stack(deltas).mean(0)
        spread = sum(float(delta.square().sum()) for delta in deltas) / len(deltas) ** 2
        theory = ((1 - DENSITY) / DENSITY * spread) ** 0.5
        shares.append(float((as_matrix(merged) - mean).norm()) / theory)
    return max(shares, key=lambda share: abs(share - 1))


def true_merge(adapters: Sequence[Adapter], rank: int | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the average, cut to a rank if one is named, in float64 and by another route."""
    truth = {}
    for layer in adapters[0].modules:
        factors = [adapter.modules[layer] for adapter in adapters]
        b = torch.cat([f.b.double() for f in factors], dim=1) / len(factors)
        a = torch.cat([f.a.double() for f in factors])
        if rank is not None:
            qb, rb = torch.linalg.qr(b)
            qa, ra = torch.linalg.qr(a.T)
            u, s, vh = torch.linalg.svd(rb @ ra.T)
            b, a = qb @ (u[:, :rank] * s[:rank]), vh[:rank] @ qa.T
        truth[layer] = (b, a)
    return truth


def relative_error(found: tuple[Tensor, Tensor], truth: tuple[Tensor, Tensor]) -> float:
    """Return `|found - truth| / |truth|` of the products, from QRs and so without squaring."""
    b = torch.cat([found[0].double(), -truth[0]], dim=1)
    a = torch.cat([found[1].double(), truth[1]])
    return _norm(b, a) / _norm(*truth)


def _norm(b: Tensor, a: Tensor) -> float:
    return float(torch.linalg.norm(torch.linalg.qr(b).R @ torch.linalg.qr(a.T).R.T))
