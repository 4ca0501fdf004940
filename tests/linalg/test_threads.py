"""The number of kernel threads: as asked inside, as before outside."""

import pytest
import torch

from icm_ray.linalg.threads import kernel_threads


def test_the_count_holds_inside_and_is_restored() -> None:
    before = torch.get_num_threads()
    with kernel_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        with kernel_threads(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_the_count_is_restored_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(KeyError), kernel_threads(before + 1):
        raise KeyError
    assert torch.get_num_threads() == before
