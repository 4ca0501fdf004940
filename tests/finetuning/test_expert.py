"""An expert's batches, and what is said of its losses."""

import pytest

from icm_ray.config import ExpertSet, LoRARecipe, Training
from icm_ray.finetuning.expert import ExpertJob, batch_rows, losses_summary
from icm_ray.suites.tasks import Task


def make_job(name: str = "word", *, batch: int = 6, seed: int = 0, init="shared") -> ExpertJob:
    task = Task(name, "regression", "r2", (), 16, "nowhere", "none")
    which = ExpertSet(init=init, seed=seed)
    return ExpertJob(task, LoRARecipe(), Training(batch=batch), which, (name,))


@pytest.mark.parametrize(("examples", "batch"), [(24, 6), (24, 7), (5, 8), (1, 3), (6, 6)])
def test_each_epoch_holds_every_example_once(examples: int, batch: int) -> None:
    job = make_job(batch=batch)
    steps = 3 * examples  # whole epochs, whatever the batch
    rows = [row for step in range(steps) for row in batch_rows(job, examples, step)]
    assert len(rows) == steps * batch
    epochs = [rows[start : start + examples] for start in range(0, len(rows), examples)]
    assert all(sorted(epoch) == list(range(examples)) for epoch in epochs)
    if examples > 5:
        assert epochs[0] != epochs[1], "each epoch is shuffled afresh"


def test_batches_are_keyed_by_seed_and_task() -> None:
    one = batch_rows(make_job(), 24, 0)
    assert one == batch_rows(make_job(), 24, 0)
    assert one != batch_rows(make_job(seed=1), 24, 0)
    assert one != batch_rows(make_job("year"), 24, 0)
    assert one == batch_rows(make_job(init="own"), 24, 0)


def test_summaries_average_both_ends() -> None:
    assert losses_summary([3.0]) == {"first_loss": 3.0, "last_loss": 3.0}
    falling = [float(20 - i) for i in range(20)]
    assert losses_summary(falling) == {"first_loss": 15.5, "last_loss": 5.5}
