"""Random draws: keyed by what is drawn, equal everywhere."""

import torch

from icm_ray.seeding import generator, seed_for


def test_a_seed_is_a_function_of_its_key_and_of_nothing_else() -> None:
    assert seed_for(0, "task", "module") == 58147599764932939
    assert 0 <= seed_for() < 2**63


def test_keys_that_join_to_the_same_text_differ() -> None:
    seeds = {seed_for("ab", "c"), seed_for("a", "bc"), seed_for("abc"), seed_for("a", "b", "c")}
    assert len(seeds) == 4


def test_generators_repeat_and_leave_the_global_one_alone() -> None:
    before = torch.get_rng_state()
    first, again = (torch.randn(3, generator=generator(1, "t")) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, torch.randn(3, generator=generator(2, "t")))
    assert torch.equal(before, torch.get_rng_state())
