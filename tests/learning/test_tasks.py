"""One builder of a learner's tasks: a search's trial sees what the job that repeats it sees."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

import icm_ray
from icm_ray.base_model.loading import load_base
from icm_ray.base_model.readers import Answered
from icm_ray.config import DataSpec, InnerLoss, ObjectiveKind, ObjectiveSpec, SearchObjective
from icm_ray.errors import RecipeError
from icm_ray.evaluation.experts import ADAPTER, find_experts
from icm_ray.evaluation.heads import Head
from icm_ray.learning.objectives import INNER, OBJECTIVES, objective_of, reads_heads
from icm_ray.learning.tasks import LearnerData, Readable, experts_for, learner_data
from icm_ray.search.objectives import AIMS
from icm_ray.suites import SUITES, Task

ROOT = Path(__file__).parents[2]
SPECS: dict[str, ObjectiveSpec] = {
    **{kind: ObjectiveSpec(kind=kind) for kind in get_args(ObjectiveKind)},
    "task_vector_match through heads": ObjectiveSpec(kind="task_vector_match", heads=True),
}


def data_of(suite: str, count: int = 3) -> tuple[DataSpec, str, list[str]]:
    folder = ROOT / "docs" / "results" / suite / "experts" / "shared-seed0"
    return DataSpec(suite=suite, inputs_per_task=count), str(folder), sorted(find_experts(folder))


@pytest.mark.slow
# Drawing the vision suite's rooms takes a quarter of a minute.
@pytest.mark.parametrize(
    "suite", [*sorted(set(SUITES) - {"vision"}), pytest.param("vision", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", SPECS)
def test_a_search_over_everything_shows_each_objective_what_its_job_shows(suite, name) -> None:
    data, folder, tasks = data_of(suite)
    objective = SPECS[name]
    pairs = [(task, Path(folder) / task / ADAPTER) for task in tasks]
    job = learner_data(data, tasks, [objective], experts_for(objective, folder, data, pairs))
    everything = learner_data(data, tasks, list(SPECS.values()), find_experts(Path(folder)))
    trial = everything.seen_by(objective)
    assert trial.key == job.key
    assert set(trial.readable) == (set(tasks) if reads_heads(objective) else set())
    labelled = [task for task, one in trial.readable.items() if one.targets is not None]
    labels = OBJECTIVES[objective.kind].reads_labels and suite != "lm"  # texts are their own
    assert labelled == (tasks if labels else [])


def test_answers_in_words_reach_a_supervised_trial(tiny_llama, make_adapter) -> None:
    data, folder, tasks = data_of("generation")
    trial = learner_data(data, tasks, list(SPECS.values()), find_experts(Path(folder)))
    adapters = [make_adapter(task) for task in tasks]
    base = load_base(tiny_llama)
    inputs = trial.seen_by(SPECS["supervised"]).batched(adapters, base.reader, 2)
    assert all(isinstance(batch, Answered) for one in inputs for batch in one.batches)
    assert all(objective_of(SPECS["supervised"], base).of(one) for one in inputs)
    for one in trial.seen_by(SPECS["distillation"]).batched(adapters, base.reader, 2):
        assert not any(isinstance(batch, Answered) for batch in one.batches)


def test_a_patch_s_kind_is_told_to_those_who_read_heads_alone(make_adapter, texts) -> None:
    task = Task("depth", "dense_regression", "r2", (), 8, "", "")
    head = Head(torch.ones(1, 16), torch.zeros(1), 2.0, 4.0)
    data = LearnerData({"depth": (texts[:4], 8)}, {"depth": Readable(task, head, [2.0] * 4)})
    assert data.seen_by(SPECS["task_vector_match"]).readable == {}
    seen = data.seen_by(SPECS["task_vector_match through heads"]).readable["depth"]
    assert (seen.task, seen.head, seen.targets) == (task, head, None)
    whole = data.seen_by(SPECS["supervised"]).readable["depth"]
    assert torch.equal(whole.standardised(), torch.zeros(4))


def test_a_part_is_the_first_inputs_with_their_labels(texts) -> None:
    task = Task("word", "classification", "accuracy", ("x", "y"), 8, "", "")
    data = LearnerData({"word": (texts[:6], 8)}, {"word": Readable(task, None, list(range(6)))})
    part = data.first(2)
    assert part.inputs["word"] == (texts[:2], 8)
    assert part.readable["word"].targets == [0, 1]
    assert data.first(None) is data


def test_whatever_changes_what_is_seen_changes_the_key(texts) -> None:
    task = Task("word", "classification", "accuracy", ("x", "y"), 8, "", "")
    head = Head(torch.ones(2, 16), torch.zeros(2))
    data = LearnerData({"word": (texts[:4], 8)}, {"word": Readable(task, head, [0, 1, 0, 1])})
    readable = data.readable["word"]
    others: list[Any] = [
        LearnerData({"word": (texts[:3], 8)}, data.readable),
        LearnerData({"word": (texts[:4], 7)}, data.readable),
        LearnerData(data.inputs),
        LearnerData(data.inputs, {"word": replace(readable, targets=[0, 1, 1, 1])}),
        LearnerData(data.inputs, {"word": replace(readable, targets=None)}),
        LearnerData(data.inputs, {"word": replace(readable, head=Head(head.weight, head.bias, 1))}),
        LearnerData(data.inputs, {"word": replace(readable, head=None)}),
    ]
    keys = {str(one.key) for one in others}
    assert len(keys) == len(others)
    assert str(data.key) not in keys


def test_heads_that_are_read_must_be_there(make_adapter, tmp_path) -> None:
    data, folder, tasks = data_of("text")
    for task in tasks:
        bare = replace(make_adapter(task), config={"task_type": "FEATURE_EXTRACTION"})
        icm_ray.save_adapter(bare, tmp_path / task)
    objective, pairs = SPECS["distillation"], [(task, tmp_path / task) for task in tasks]
    with pytest.raises(RecipeError, match="none for another"):
        experts_for(objective, folder, data, [*pairs, ("another", tmp_path)])
    with pytest.raises(RecipeError) as caught:  # none lies with the adapters
        experts_for(objective, None, data, pairs)
    assert len(caught.value.problems) == len(tasks)
    plain = DataSpec(path="somewhere", inputs_per_task=3)
    with pytest.raises(RecipeError, match="missing but objective 'distillation'"):
        experts_for(objective, folder, plain, pairs)
    assert experts_for(SPECS["null_space_ratio"], None, data, pairs) == {}
    beside = [(task, Path(folder) / task / ADAPTER) for task in tasks]
    assert set(experts_for(objective, None, data, beside)) == set(tasks)


def test_recipes_know_the_objectives_there_are() -> None:
    assert set(get_args(ObjectiveKind)) == set(OBJECTIVES)
    assert set(get_args(InnerLoss)) == {*INNER, "reconstruction"}
    assert set(get_args(SearchObjective)) == set(AIMS)
