"""Gram matrices against their definition."""

import torch

from icm_ray.linalg.gram import damped, inner_products


def test_inner_products_are_those_of_the_dense_products() -> None:
    draw = torch.Generator().manual_seed(0)
    pairs = [
        (torch.randn(6, r, generator=draw), torch.randn(r, 5, generator=draw)) for r in (2, 0, 9, 1)
    ]
    flat = torch.stack([(b @ a).flatten().double() for b, a in pairs])
    torch.testing.assert_close(inner_products(pairs), flat @ flat.T, rtol=1e-5, atol=1e-5)


def test_damping_shrinks_around_the_diagonal_and_raises_it() -> None:
    gram = torch.tensor([[3.0, 2.0], [2.0, 1.0]])
    expected = torch.tensor([[3.2, 1.0], [1.0, 1.2]], dtype=torch.float64)
    torch.testing.assert_close(damped(gram, 0.5, 0.1), expected)
    assert torch.equal(damped(gram, 1.0, 0.0), gram.double())
    double = gram.double()
    damped(double, 0.5, 0.1)
    assert torch.equal(double, gram.double())
