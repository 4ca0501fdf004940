"""Random adapters keep shapes and singular values, and nothing else."""

from dataclasses import replace

import pytest
import torch

from icm_ray.adapters import load_adapter, random_like, save_adapter
from icm_ray.types import LoRAFactors


@pytest.fixture
def law(make_adapter):
    return make_adapter("law", shapes={"q": (24, 16), "v": (8, 16), "narrow": (2, 16)})


def values(factors: LoRAFactors) -> torch.Tensor:
    s = torch.linalg.svdvals(factors.delta().double())
    return s[s > 1e-5 * s[0]]


def test_only_directions_are_new(law):
    found = random_like(law, 0)
    assert found.modules.keys() == law.modules.keys()
    for module, factors in law.modules.items():
        other = found.modules[module]
        assert other.shape == factors.shape
        assert other.rank <= factors.rank
        torch.testing.assert_close(values(other), values(factors), rtol=1e-4, atol=1e-5)
    x, y = (a.modules["q"].delta() for a in (law, found))
    assert abs(float((x * y).sum() / x.norm() / y.norm())) < 0.4, "24 x 16 numbers, nearly apart"


def test_the_draw_is_the_seeds_and_the_names(law, make_adapter, tmp_path):
    one = random_like(law, 3)
    assert random_like(law, 3).fingerprint == one.fingerprint
    assert random_like(law, 4).fingerprint != one.fingerprint
    other = make_adapter("code", shapes={"q": (24, 16), "v": (8, 16), "narrow": (2, 16)})
    a, b = one.modules["q"].a, random_like(other, 3).modules["q"].a
    overlap = torch.linalg.svdvals(torch.linalg.qr(a.T)[0].T @ torch.linalg.qr(b.T)[0])
    assert overlap.max() < 0.99, "of another name, so of other directions"
    save_adapter(one, tmp_path / "one")
    assert load_adapter(tmp_path / "one").fingerprint == one.fingerprint


def test_a_module_without_change_stays_so(law):
    empty = LoRAFactors(torch.randn(2, 16), torch.zeros(24, 2))
    found = random_like(replace(law, modules={**law.modules, "q": empty}), 0)
    assert found.modules["q"].rank == 0
    assert found.modules["q"].shape == (24, 16)
