"""Actors hold one adapter each, share one base, and give the evidence of the serial path."""

import os
import shutil
import time

import psutil
import pytest
import ray
import torch
from ray_samples import save_tiny_bert
from safetensors.torch import load_file, save_file

from icm_ray.adapters import load_adapter, open_all
from icm_ray.base_model.loading import load_base
from icm_ray.base_model.states import make_batches, tokenize
from icm_ray.config import Resources
from icm_ray.distributed.actors import AdapterSource, start_actors
from icm_ray.distributed.evidence import evidence_key, gather_on_ray
from icm_ray.distributed.scores import ScoreItem, load_scores, score_on_ray
from icm_ray.distributed.shared_base import share_base
from icm_ray.errors import InputError
from icm_ray.evaluation.heads import Head
from icm_ray.evaluation.scoring import TaskData, evaluate
from icm_ray.evidence.gather import gather
from icm_ray.suites import SUITES

SMALL = Resources(cpus_per_worker=0.25, workers=4)
BATCH = 8
TASKS = ("year", "depth")


@pytest.fixture(scope="module")
def shared(tiny_bert, ray_session):
    return share_base(tiny_bert)


@pytest.fixture(scope="module")
def pool(shared):
    actors = start_actors(shared, SMALL, 4)
    yield actors
    for actor in actors:
        ray.kill(actor)


@pytest.fixture(scope="module")
def sources(adapters):
    files = open_all(adapters)
    return [AdapterSource(f.name, str(f.path), f.fingerprint()) for f in files]


@pytest.fixture(scope="module")
def inputs(sources):
    texts = SUITES["text"].load("year", "calibration", 60).texts
    return {s.name: (texts[i : i + 20 + i], 24) for i, s in enumerate(sources)}


@pytest.fixture(scope="module")
def data():
    """Two tasks with random heads, enough to score something."""
    suite, draw = SUITES["text"], torch.Generator().manual_seed(0)
    found = {}
    for name in TASKS:
        task = suite.tasks[name]
        head = Head(torch.randn(task.outputs, 16, generator=draw), torch.zeros(task.outputs))
        found[name] = TaskData(task, suite.load(name, "validation", 40), head)
    return found


def pid_of(actor):
    return ray.get(actor.__ray_call__.remote(lambda self: os.getpid()), timeout=60)


def equal(found, expected):
    assert (found.task, found.fingerprint) == (expected.task, expected.fingerprint)
    assert torch.equal(found.task_vector, expected.task_vector)
    assert found.expert_ratios == expected.expert_ratios
    assert found.base_ratios == expected.base_ratios
    assert found.inputs == expected.inputs


def test_any_number_of_actors_gives_the_serial_evidence(
    pool, sources, inputs, tiny_bert, one_thread
):
    base = load_base(tiny_bert)
    expected = []
    for source in sources:
        texts, tokens = inputs[source.name]
        ids = tokenize(base.tokenizer, texts, tokens)
        batches = make_batches(ids, BATCH, base.tokenizer.pad_token_id)
        expected.append(gather(base.model, load_adapter(source.path, source.name), batches))
    for count in (1, 2, 4):
        # Given backwards and with more adapters than actors: neither shows in the result.
        found = gather_on_ray(pool[:count], sources[::-1], inputs, batch=BATCH, timeout=120)
        assert [e.task for e in found] == sorted(s.name for s in sources)
        for one, other in zip(found, expected, strict=True):
            equal(one, other)
        assert all(0 < e.task_vector.norm() < 100 for e in found)


def test_each_adapter_changes_its_own_evidence(pool, sources, inputs):
    found = gather_on_ray(pool, sources, inputs, batch=BATCH, timeout=120)
    vectors = [e.task_vector for e in found]
    assert all(not torch.equal(a, b) for i, a in enumerate(vectors) for b in vectors[i + 1 :])
    assert set(found[4].expert_ratios) < set(found[0].expert_ratios)  # values only


def test_two_actors_work_at_the_same_time(pool, sources):
    pids = {pid_of(actor) for actor in pool}
    assert len(pids) == 4
    assert os.getpid() not in pids
    texts = SUITES["text"].load("year", "train", 1500).texts
    since = time.time() * 1e6
    gather_on_ray(
        pool[:2], sources[:2], {s.name: (texts, 24) for s in sources}, batch=BATCH, timeout=300
    )
    calls = []
    for _ in range(60):  # Ray writes its events out every second
        calls = [
            event
            for event in ray.timeline()
            if event["cat"] == "task::AdapterActor.evidence" and event["ts"] >= since
        ]
        if len(calls) == 2:
            break
        time.sleep(0.5)
    (a, b) = calls
    assert (a["pid"], a["tid"]) != (b["pid"], b["tid"])
    overlap = min(a["ts"] + a["dur"], b["ts"] + b["dur"]) - max(a["ts"], b["ts"])
    assert overlap > 0.25 * min(a["dur"], b["dur"])


def test_an_extra_actor_costs_less_than_a_quarter_of_the_base(pool, ray_session, tmp_path):
    large = share_base(save_tiny_bert(tmp_path, rows=1_300_000))
    assert large.bytes > 80_000_000
    (actor,) = start_actors(large, SMALL, 1)
    try:
        ray.get(actor.base_fingerprint.remote(), timeout=120)
        without = min(psutil.Process(pid_of(one)).memory_full_info().uss for one in pool)
        own = psutil.Process(pid_of(actor)).memory_full_info().uss
        assert own - without < large.bytes / 4
    finally:
        ray.kill(actor)


def test_scores_are_the_serial_ones_and_kept_by_content(
    pool, shared, sources, data, tiny_bert, tmp_path, one_thread
):
    items = [ScoreItem("base", None, TASKS), ScoreItem("one", sources[0], TASKS)]
    items.append(ScoreItem("one task", sources[1], ("year",)))
    order = {"base": shared.fingerprint, "batch": BATCH, "timeout": 120}
    found = score_on_ray(pool, items, data, tmp_path, **order)
    base = load_base(tiny_bert)
    adapter = load_adapter(sources[0].path, sources[0].name)
    for label, one in (("base", None), ("one", adapter)):
        expected = evaluate(base, one, data, batch=BATCH)
        for task in TASKS:
            assert found[label][task].score == expected[task].score
            assert (found[label][task].predictions == expected[task].predictions).all()
    assert list(found["one task"]) == ["year"]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = score_on_ray([], items, data, tmp_path, **order)  # no actor is needed any more
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == stamps
    assert again["one"]["year"].score == found["one"]["year"].score
    # Other examples are another score.
    fewer = {
        t: TaskData(d.task, SUITES["text"].load(t, "validation", 20), d.head)
        for t, d in data.items()
    }
    key = items[0].key(shared.fingerprint, data, BATCH)
    assert items[0].key(shared.fingerprint, fewer, BATCH) != key
    assert load_scores(tmp_path / key[:20])["year"].score == found["base"]["year"].score


def test_the_shared_base_stays_as_it_was(pool, shared, sources, inputs, data, tmp_path):
    gather_on_ray(pool, sources, inputs, batch=BATCH, timeout=120)
    items = [ScoreItem("a", sources[2], TASKS)]
    order = {"base": shared.fingerprint, "batch": BATCH, "timeout": 120}
    score_on_ray(pool, items, data, tmp_path, **order)
    prints = ray.get([actor.base_fingerprint.remote() for actor in pool], timeout=120)
    assert set(prints) == {shared.fingerprint}


def test_an_actor_holds_one_adapter_at_a_time(pool, sources, inputs):
    first, second = sources[:2]
    actor = pool[0]
    for source in (first, second, second):
        texts, tokens = inputs[source.name]
        ray.get(actor.evidence.remote(source, texts, tokens, BATCH), timeout=60)
        held = ray.get(actor.__ray_call__.remote(lambda self: self.held[1].name), timeout=60)
        assert held == source.name


def test_an_adapter_that_changes_during_the_job_is_refused(pool, sources, inputs, tmp_path):
    folder = shutil.copytree(sources[0].path, tmp_path / "changing")
    source = AdapterSource("task0", str(folder), sources[0].fingerprint)
    gather_on_ray(pool[:1], [source], inputs, batch=BATCH, timeout=120)
    weights = folder / "adapter_model.safetensors"
    save_file({n: t * 2 for n, t in load_file(weights).items()}, weights, metadata={"format": "pt"})
    # Another actor, which has not read it yet.
    with pytest.raises(InputError, match="changed while the job ran") as caught:
        gather_on_ray(pool[1:2], [source], inputs, batch=BATCH, timeout=120)
    assert str(folder) in str(caught.value)


def test_evidence_is_keyed_by_all_that_it_is_made_from(shared, sources, inputs):
    def key(base=shared.fingerprint, sources=sources, inputs=inputs, batch=BATCH):
        return evidence_key(base, sources, inputs, batch)

    other = AdapterSource("task0", sources[0].path, "0" * 64)
    fewer = {**inputs, "task0": (inputs["task0"][0][:5], 24)}
    keys = {key(), key(base="x"), key(batch=9), key(sources=[other]), key(inputs=fewer)}
    assert len(keys) == 5
    moved = [AdapterSource(s.name, "/elsewhere", s.fingerprint) for s in sources[::-1]]
    assert key(sources=moved) == key()
