"""Learned merging on Ray: the serial learner's bytes, whoever computes and whoever dies."""

import json
import os
import signal
from dataclasses import replace

import pytest
import ray
import torch
from learning_samples import rebuilt
from ray_samples import hashes, session_on, write_yaml

from icm_ray.adapters import load_adapter
from icm_ray.base_model.loading import load_base
from icm_ray.base_model.states import make_batches, tokenize
from icm_ray.command import run_job
from icm_ray.config import LearnRecipe, MergeRecipe, Resources
from icm_ray.distributed.learning import LearnOrder, TaskActor, learn_on_ray
from icm_ray.errors import InputError, RecipeError
from icm_ray.evidence.learned import load_learned
from icm_ray.learning.inputs import TaskInputs
from icm_ray.learning.learner import Run, learn
from icm_ray.learning.recipes import LEARNERS, plan_of, spec_of
from icm_ray.merging.merge import merge
from jobs.learn import work as learn_work
from jobs.merge import work as merge_work

TEXTS = ("abc de", "fgh", "i j k l m", "nop qrs tuv", "w x", "yz ab cd")
SHORT = {"steps": 5, "batch": 2, "save_every": 2}


@pytest.fixture(scope="module")
def tasks(adapters, tiny_bert):
    base = load_base(tiny_bert)
    made = []
    for number, (name, path) in enumerate(adapters[:3]):
        texts = [f"{text} {'abc'[number]}" for text in TEXTS]
        batches = make_batches(tokenize(base.tokenizer, texts, 32), 2, 0)
        made.append(TaskInputs(load_adapter(path, name), batches))
    return made


def order_for(tasks, method, **changes):
    spec = spec_of(method, {"optimisation": SHORT, **changes})
    return LearnOrder(plan_of(spec, [task.adapter for task in tasks]), tasks, Run(seed=3))


@pytest.fixture
def session(tiny_bert, ray_session):
    return session_on(tiny_bert)


def on_ray(session, order, folder, workers):
    folder.mkdir(parents=True, exist_ok=True)
    resources = Resources(workers=workers, cpus_per_worker=0.5)
    order = replace(order, run=replace(order.run, scratch=folder, key="k"))
    learned, seconds = learn_on_ray(replace(session, resources=resources), order, "test")
    assert seconds > 0
    return learned


def same(found, expected):
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], t) for name, t in expected.tensors.items())
    assert found.report == expected.report


def serial(tiny_bert, order):
    base = load_base(tiny_bert)
    return learn(base.model, order.plan.learning(base), order.tasks, order.run)


PLAIN = {"start": {"value": 0.3, "residual": None}}  # no Gram statistics needed
CASES = {
    "nsc": {},
    "row_space_match": {**PLAIN, "parameters": {"kind": "coefficients"}},
    "task_vector_match": PLAIN,
}
# An actor is a process that imports torch and transformers, so most pairs are for other days.
MARKS = {
    ("row_space_match", 2): (),
    ("row_space_match", 4): pytest.mark.slow,
    ("nsc", 2): pytest.mark.slow,
    ("task_vector_match", 2): pytest.mark.slow,
}


@pytest.mark.parametrize(
    ("method", "workers"),
    [
        pytest.param(method, workers, marks=MARKS.get((method, workers), pytest.mark.long))
        for method in CASES
        for workers in (1, 2, 4)
    ],
)
def test_any_number_of_actors_gives_the_serial_learner(
    tasks, tiny_bert, session, tmp_path, one_thread, method, workers
):
    order = order_for(tasks, method, **CASES[method])
    expected = serial(tiny_bert, order)
    assert expected.report["losses"]["task0"]["start"] != expected.report["losses"]["task0"]["end"]
    same(on_ray(session, order, tmp_path, workers), expected)


@pytest.mark.slow
def test_a_dead_actor_leaves_no_trace(tasks, tiny_bert, session, tmp_path, one_thread, monkeypatch):
    order = order_for(tasks, "row_space_match", **PLAIN)
    expected = serial(tiny_bert, order)
    started = TaskActor.options

    def options(**wants):
        kind = started(**wants)

        class Doomed:
            @staticmethod
            def remote(*arguments):
                actor = kind.remote(*arguments)
                pid = ray.get(actor.__ray_call__.remote(lambda _self: os.getpid()))
                os.kill(pid, signal.SIGKILL)
                return actor

        return Doomed

    monkeypatch.setattr(TaskActor, "options", options)
    same(on_ray(session, order, tmp_path / "killed", 2), expected)


@pytest.mark.slow
def test_a_run_continues_where_it_stopped(
    tasks, tiny_bert, session, tmp_path, one_thread, monkeypatch
):
    from icm_ray.learning.descent import Descent

    order = order_for(tasks, "row_space_match", **PLAIN)
    expected = serial(tiny_bert, order)
    moves = []
    move = Descent.move

    def stopping(self, parts):
        if len(moves) == 3:
            raise KeyboardInterrupt
        moves.append(self.step)
        move(self, parts)

    monkeypatch.setattr(Descent, "move", stopping)
    with pytest.raises(KeyboardInterrupt):
        on_ray(session, order, tmp_path / "stopped", 1)

    def counting(self, parts):
        moves.append(self.step)
        move(self, parts)

    monkeypatch.setattr(Descent, "move", counting)
    same(on_ray(session, order, tmp_path / "stopped", 1), expected)
    assert moves == [0, 1, 2, 2, 3, 4], "the state of step 2 was saved"


@pytest.fixture
def recipe(adapters, tiny_bert, tmp_path):
    refs = adapters[:3]
    (tmp_path / "data").mkdir()
    for number, (name, _) in enumerate(refs):
        lines = [json.dumps({"text": f"{text} {'abc'[number]}"}) for text in TEXTS]
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(lines))
    content = {
        "adapters": [{"name": name, "path": str(path)} for name, path in refs],
        "method": "task_vector_match",
        "learn": {"optimisation": SHORT},
        "base": str(tiny_bert),
        "data": {"path": str(tmp_path / "data"), "inputs_per_task": 6},
        "resources": {"workers": 1, "cpus_per_worker": 0.5},
    }
    return tmp_path, content


@pytest.mark.slow
def test_the_job_s_evidence_and_a_merge_that_gathers_it_are_one(recipe, adapters):
    root, content = recipe
    path = write_yaml(root / "learn.yaml", {**content, "output": str(root / "learned")})
    assert run_job(LearnRecipe, learn_work, "", ["-c", str(path)]) == 0
    results = json.loads((root / "learned" / "results.json").read_text())
    before, after = (
        sum(loss[when] for loss in results["losses"].values()) for when in ("start", "end")
    )
    assert after < before
    path = write_yaml(root / "merge.yaml", {**content, "output": {"path": str(root / "merged")}})
    assert run_job(MergeRecipe, merge_work, "", ["-c", str(path)]) == 0
    assert hashes(root / "merged.evidence") == hashes(root / "learned")
    given = [load_adapter(path, name) for name, path in adapters[:3]]
    by_hand = merge(given, "task_vector_match", evidence=root / "learned")
    exact = rebuilt(load_learned(root / "learned"), given)
    for module, factors in exact.items():
        found = by_hand.adapter.modules[module]
        torch.testing.assert_close(found.delta(), factors.delta())
    with pytest.raises(InputError, match="learned with task2 too"):
        merge(given[:2], "task_vector_match", evidence=root / "learned")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "soup", "learn": {}}, "method: 'soup' learns nothing"),
        ({"learn": {"objective": {"kind": "entropi"}}}, "learn.objective.kind"),
        ({"learn": {"optimiser": {"lr": 1}}}, "learn.optimiser"),
        ({"method": "icm_fusion"}, "fusion: None with method 'icm_fusion'"),
        ({"fusion": "runs/vae"}, "fusion: 'runs/vae' with method 'task_vector_match'"),
        (
            {"method": "icm_fusion", "fusion": "runs/vae", "learn": {"start": {"value": 0.1}}},
            "of start only residual, residual_scale, rho act",
        ),
        ({"method": "adamerging"}, "data.suite: missing but objective 'entropy'"),
    ],
)
def test_wrong_recipes_are_named_before_any_work(recipe, capsys, changes, words):
    root, content = recipe
    path = write_yaml(root / "learn.yaml", {**content, "output": str(root / "learned"), **changes})
    assert run_job(LearnRecipe, learn_work, "", ["-c", str(path)]) == 2
    assert words in capsys.readouterr().err
    assert not (root / "learned").exists()


def test_every_learner_is_a_method_and_the_other_way_round():
    from icm_ray import METHODS

    assert {name for name, row in METHODS.items() if row.needs == "learned_merge"} == set(LEARNERS)
    with pytest.raises(RecipeError, match="one of nsc"):
        spec_of("cat", {})
