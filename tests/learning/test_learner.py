"""The loop: it minimises, repeats, resumes, splits over workers, and tells what happened."""

import itertools

import pytest
import torch
from learning_samples import merged_factors, rebuilt

from icm_ray.config import OptimisationSpec
from icm_ray.errors import InputError, RecipeError
from icm_ray.learning.descent import STATE, Descent
from icm_ray.learning.gradients import Learning, Share, TaskGradients
from icm_ray.learning.learner import Run, learn
from icm_ray.learning.objectives.entropy import HeadEntropy
from icm_ray.learning.objectives.row_space_match import RowSpaceMatch
from icm_ray.learning.objectives.supervised import Supervised
from icm_ray.learning.objectives.task_vector_match import TaskVectorMatch
from icm_ray.learning.parameters import Coefficients, CoreMatrices
from icm_ray.learning.targets import Targets

STEPS = OptimisationSpec(steps=6, lr=0.05, save_every=2)


class Killed(Exception):
    pass


def same(one, two) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_losses_fall(tiny, make_tasks, terms) -> None:
    for parameters in (Coefficients(terms, 1 / 3), CoreMatrices(terms, 1 / 3)):
        options = OptimisationSpec(steps=30, lr=0.05, weight_decay=0.0, schedule="cosine")
        learned = learn(tiny.model, Learning(parameters, TaskVectorMatch(), options), make_tasks())
        losses = learned.report["losses"].values()
        start, end = (sum(item[when][0] for item in losses) for when in ("start", "end"))
        assert end < 0.9 * start


def test_what_is_learned_is_the_merge_that_was_measured(tiny, make_tasks, terms, adapters) -> None:
    parameters = CoreMatrices(terms, 1 / 3)
    learned = learn(tiny.model, Learning(parameters, TaskVectorMatch(), STEPS), make_tasks())
    found = rebuilt(learned, adapters)
    for module, factors in merged_factors(parameters).items():
        assert torch.equal(found[module].b, factors.b)
    assert learned.adapters == {a.name: a.fingerprint for a in adapters}


def test_a_killed_run_continues_to_the_same_bytes(tiny, make_tasks, terms, tmp_path) -> None:
    def run(**options):
        parameters = Coefficients(terms, 1 / 3)
        learning = Learning(parameters, RowSpaceMatch(), STEPS)
        scratch = options.pop("scratch", None)
        return learn(tiny.model, learning, make_tasks(), Run(scratch=scratch, key="k"), **options)

    whole = run()

    def kill(step: int, _loss: float) -> None:
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        run(scratch=tmp_path, progress=kill)
    seen = []
    resumed = run(scratch=tmp_path, progress=lambda step, _loss: seen.append(step))
    assert seen == [5, 6], "the steps that were saved are not made again"
    assert same(resumed.tensors, whole.tensors)
    assert resumed.report == whole.report


@pytest.mark.parametrize("harm", ["other run", "cut off"])
def test_a_state_that_is_not_ours_is_left_aside(tiny, make_tasks, terms, tmp_path, harm) -> None:
    def run(key: str, seen: list[int]):
        return learn(
            tiny.model,
            Learning(Coefficients(terms, 1 / 3), RowSpaceMatch(), STEPS),
            make_tasks(),
            Run(scratch=tmp_path, key=key),
            progress=lambda step, _loss: seen.append(step),
        )

    run("k", [])
    if harm == "cut off":
        content = (tmp_path / STATE).read_bytes()
        (tmp_path / STATE).write_bytes(content[: len(content) // 2])
    seen: list[int] = []
    run("k" if harm == "cut off" else "another", seen)
    assert seen == [1, 2, 3, 4, 5, 6]


def test_a_loss_that_is_no_number_stops_and_is_not_resumed_into(
    tiny, make_tasks, terms, tmp_path, monkeypatch
) -> None:
    """The values are lost at the fourth step; what goes on is the state of the second."""
    move = Descent.move
    lost = [True]

    def losing(self, shares):
        move(self, shares)
        if self.step == 4 and lost:
            lost.clear()
            for leaf in self.leaves.values():
                leaf.data.fill_(float("inf"))

    def run(seen: list[int]):
        learning = Learning(Coefficients(terms, 1 / 3), RowSpaceMatch(), STEPS)
        done = Run(scratch=tmp_path, key="k")
        return learn(
            tiny.model, learning, make_tasks(), done, progress=lambda step, _l: seen.append(step)
        )

    monkeypatch.setattr(Descent, "move", losing)
    seen: list[int] = []
    with pytest.raises(RecipeError, match=r"code.* is no number at step 4\. Lower"):
        run(seen)
    assert seen == [1, 2, 3, 4]
    again: list[int] = []
    learned = run(again)
    assert again == [3, 4, 5, 6]
    assert all(bool(tensor.isfinite().all()) for tensor in learned.tensors.values())


def test_workers_that_hold_some_tasks_give_the_same_bytes(tiny, make_tasks, terms) -> None:
    whole = learn(
        tiny.model, Learning(Coefficients(terms, 0.3), RowSpaceMatch(), STEPS), make_tasks()
    )
    names = ("code", "law", "med")
    for split in ((1, 2), (2, 1), (1, 1, 1)):
        tasks, sides = make_tasks(), []
        for size in split:
            share, tasks = tasks[:size], tasks[size:]
            learning = Learning(Coefficients(terms, 0.3), RowSpaceMatch(), STEPS)
            side = TaskGradients(tiny.model, learning, share, covered=names)
            sides.append(side)
            for task in share:
                side.start(task.name)
        driven = Coefficients(terms, 0.3)
        descent = Descent(driven.tensors(), STEPS)
        while descent.step < STEPS.steps:
            parts = []
            for side in reversed(sides):
                side.load(descent.values())
                parts += [side.gradient((task,), descent.step) for task in side.tasks]
            descent.move(parts)
        assert same(driven.learned(), dict(whole.tensors))


def test_modules_without_a_path_stay_and_are_named(tiny, make_tasks, terms) -> None:
    options = OptimisationSpec(steps=3, lr=0.1, weight_decay=0.5)
    learned = learn(
        tiny.model, Learning(Coefficients(terms, 0.3), RowSpaceMatch(), options), make_tasks()
    )
    # The last target is the last block's output projection: nothing follows from itself.
    assert learned.report["unmoved"] == ["encoder.layer.1.attention.output.dense"]
    still = learned.tensors["encoder.layer.1.attention.output.dense.coefficients"]
    assert torch.equal(still, torch.full((3, 1), 0.3))


def test_a_loss_that_depends_on_nothing_is_refused(tiny, make_tasks, terms) -> None:
    first = RowSpaceMatch(Targets(("query", "key", "value"), blocks=(0,)))
    learning = Learning(Coefficients(terms, 0.3), first, STEPS)
    with pytest.raises(InputError, match="the loss depends on no coefficient"):
        learn(tiny.model, learning, make_tasks())


def test_a_run_is_carried_out_as_it_says(tiny, make_tasks, terms, monkeypatch) -> None:
    shared, saved, seen, told = [], [], [], []
    gradient = TaskGradients.gradient

    def watched(self, tasks, step):
        shared.append(tuple(tasks))
        saved.append(self.save_memory)
        seen.append((torch.get_num_threads(), self.seed))
        return gradient(self, tasks, step)

    monkeypatch.setattr(TaskGradients, "gradient", watched)
    how = OptimisationSpec(steps=1, lr=0.1, tasks_per_forward=2, save_memory=True)
    learning = Learning(Coefficients(terms, 0.3), TaskVectorMatch(), how)
    run, progress = Run(seed=7, threads=2), {"progress": lambda _step, loss: told.append(loss)}
    found = learn(tiny.model, learning, make_tasks(), run, **progress)
    assert shared == [("code", "law"), ("med",)]
    assert set(saved) == {True}
    assert set(seen) == {(2, 7)}
    assert told == [pytest.approx(sum(one[0] for one in found.report["history"].values()) / 3)]


def test_tasks_without_an_objective_are_merged_all_the_same(tiny, make_tasks, terms) -> None:
    learned = learn(
        tiny.model, Learning(Coefficients(terms, 0.3), HeadEntropy(), STEPS), make_tasks()
    )
    assert set(learned.report["history"]) == {"code", "law"}
    assert learned.tasks == ("code", "law", "med")
    with pytest.raises(RecipeError, match="Supervised says nothing about any of the tasks"):
        learn(tiny.model, Learning(Coefficients(terms, 0.3), Supervised(), STEPS), make_tasks())


@pytest.mark.slow
def test_the_worst_task_can_count_most(tiny, make_tasks, terms) -> None:
    ends = {}
    for worst in (None, 0.02):
        options = OptimisationSpec(
            steps=40, lr=0.02, weight_decay=0.0, schedule="linear", worst=worst
        )
        parameters = Coefficients(terms, 1 / 3)
        report = learn(
            tiny.model, Learning(parameters, TaskVectorMatch(), options), make_tasks(8)
        ).report
        ends[worst] = [item["end"][0] for item in report["losses"].values()]
    assert max(ends[0.02]) < max(ends[None])
    shared = options.model_copy(update={"tasks_per_forward": 2})
    with pytest.raises(RecipeError, match="tasks_per_forward: 2 but 1 is expected"):
        learn(tiny.model, Learning(parameters, TaskVectorMatch(), shared), make_tasks())


def part(task: str, value: float, **gradients: float) -> Share:
    return Share({task: value}, {n: torch.tensor([[g]]) for n, g in gradients.items()})


def two_numbers() -> dict[str, torch.Tensor]:
    return {name: torch.ones(1, 1).requires_grad_() for name in ("x", "y")}


def test_parts_are_added_in_the_order_of_names() -> None:
    parts = [part("b", 1.0, x=1.0), part("a", 1.0, x=1e8), part("c", 1.0, x=-1e8)]
    descents = []
    for order in (parts, parts[::-1], parts[1:] + parts[:1]):
        descent = Descent(two_numbers(), OptimisationSpec(steps=1, lr=0.1))
        descent.move(order)
        descents.append(descent)
    assert {float(d.leaves["x"].grad) for d in descents} == {1.0}, "float64 loses no task"
    assert descents[0].history == [{"a": 1.0, "b": 1.0, "c": 1.0}]


def test_what_a_sum_of_parts_rounds_to_depends_on_no_order() -> None:
    parts = [part("a", 1.0, x=1e16), part("b", 1.0, x=1.0), part("c", 1.0, x=-1e16)]
    slopes = set()
    for order in itertools.permutations(parts):
        descent = Descent(two_numbers(), OptimisationSpec(steps=1, lr=0.1))
        descent.move(order)
        slopes.add(float(descent.leaves["x"].grad))
    assert len(slopes) == 1


@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_every_step_is_as_long_as_its_rate(optimizer) -> None:
    options = OptimisationSpec(
        steps=4, lr=0.5, optimizer=optimizer, weight_decay=0.0, schedule="linear"
    )
    descent, places = Descent(two_numbers(), options), [1.0]
    for _ in range(4):  # of equal gradients Adam's step is the rate
        descent.move([part("a", 1.0, x=3.0)])
        places.append(float(descent.values()["x"]))
    steps = [before - after for before, after in itertools.pairwise(places)]
    assert steps == pytest.approx([0.5, 0.375, 0.25, 0.125], rel=1e-4)


def test_adam_adds_its_decay_to_the_gradient_and_adamw_to_the_step() -> None:
    ends = []
    for optimizer in ("adam", "adamw"):
        how = OptimisationSpec(steps=1, lr=0.1, optimizer=optimizer, weight_decay=0.5)
        descent = Descent(two_numbers(), how)
        descent.move([part("a", 1.0, x=0.0)])
        ends.append(float(descent.values()["x"]))
    assert ends == pytest.approx([0.9, 0.95])


def test_no_gradient_is_not_a_gradient_of_zero() -> None:
    descent = Descent(two_numbers(), OptimisationSpec(steps=1, lr=0.1, weight_decay=0.5))
    descent.move([part("a", 1.0, x=0.0)])
    assert float(descent.values()["x"]) == pytest.approx(0.95)
    assert float(descent.values()["y"]) == 1.0
    assert descent.unmoved == ["y"]


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("constant", [1.0, 1.0, 1.0, 1.0]),
        ("linear", [1.0, 0.75, 0.5, 0.25]),
        ("cosine", [1.0, 0.8536, 0.5, 0.1464]),
    ],
)
def test_schedules(schedule, rates) -> None:
    options = OptimisationSpec(steps=4, lr=1.0, schedule=schedule)
    assert [options.rate(i) for i in range(4)] == pytest.approx(rates, abs=1e-4)


def test_weights_of_tasks() -> None:
    options = OptimisationSpec(steps=1, lr=1.0, task_weights={"b": 3.0})
    assert options.weights(("a", "b")) == {"a": 0.5, "b": 1.5}
    assert OptimisationSpec(steps=1, lr=1.0, reduction="sum").weights(("a", "b")) == {
        "a": 1.0,
        "b": 1.0,
    }


def test_a_smooth_maximum_leans_on_the_largest_loss() -> None:
    descent = Descent(two_numbers(), OptimisationSpec(steps=1, lr=0.1, worst=0.1))
    factors = descent._factors({"a": 1.0, "b": 0.5, "c": 1.0})
    assert sum(factors.values()) == pytest.approx(3.0)
    assert factors["a"] == factors["c"] > 100 * factors["b"]
