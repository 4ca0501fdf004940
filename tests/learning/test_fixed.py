"""An objective's losses of merges that are already made."""

from dataclasses import replace

import pytest

from icm_ray.config import OptimisationSpec
from icm_ray.learning.fixed import FixedLosses
from icm_ray.learning.gradients import Learning, TaskGradients
from icm_ray.learning.objectives.entropy import HeadEntropy
from icm_ray.learning.objectives.null_space_ratio import NullSpaceRatio
from icm_ray.learning.objectives.row_space_match import RowSpaceMatch
from icm_ray.learning.objectives.task_vector_match import TaskVectorMatch
from icm_ray.learning.parameters import Coefficients
from icm_ray.merging.merge import merge


@pytest.mark.parametrize(
    "objective", [NullSpaceRatio(), RowSpaceMatch(), TaskVectorMatch(), HeadEntropy()], ids=str
)
def test_an_average_has_the_losses_a_learner_starts_from(
    tiny, adapters, terms, make_tasks, objective
):
    tasks = make_tasks()
    losses = FixedLosses(tiny.model, objective, tasks)
    side = TaskGradients(
        tiny.model, Learning(Coefficients(terms, 1 / 3), objective, OptimisationSpec()), tasks
    )
    found = losses.of(merge(adapters, "soup").adapter)
    assert set(found) == set(losses.tasks)
    for task in losses.tasks:
        start = side.start(task).start
        assert found[task] == pytest.approx(sum(start) / len(start), rel=1e-5)


def test_an_expert_alone_has_nothing_to_match(tiny, adapters, make_tasks):
    losses = FixedLosses(tiny.model, RowSpaceMatch(), make_tasks())
    for adapter in adapters:
        assert losses.of(adapter)[adapter.name] == pytest.approx(0, abs=1e-8)
    nothing = replace(adapters[0], modules={})
    match = FixedLosses(tiny.model, TaskVectorMatch(), make_tasks()).of(nothing)
    assert list(match.values()) == pytest.approx([1.0] * 3)
