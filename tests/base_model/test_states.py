"""States of several batches in one pass are those of each alone."""

import torch

from icm_ray.base_model.loading import load_base
from icm_ray.base_model.readers import Batch, alike
from icm_ray.base_model.states import pooled, states_of


def test_a_pass_over_several_batches_gives_each_its_own(tiny_bert, texts) -> None:
    base = load_base(tiny_bert)
    read = base.reader.read(texts, 16)
    batches = [base.reader.batch(read, rows) for rows in ([0, 1], [4], [9, 2, 3])]
    assert len({batch.mask.shape[1] for batch in batches}) > 1
    for batch, states in zip(batches, states_of(base.model, batches), strict=True):
        (alone,) = states_of(base.model, [batch])
        assert states.batch is batch
        torch.testing.assert_close(states.hidden[batch.mask], alone.hidden[batch.mask])
        torch.testing.assert_close(states.summary, alone.summary)
        torch.testing.assert_close(states.pooled(), pooled(base.model, batch))


def test_images_of_one_size_are_alike() -> None:
    sizes = {"a": 28, "b": 42, "c": 28}
    batches = {
        name: Batch(torch.zeros(1, 3, side, side), torch.ones(1, 5).bool(), torch.tensor([0]))
        for name, side in sizes.items()
    }
    assert [list(group) for group in alike(batches)] == [["a", "c"], ["b"]]
