"""Actors hold one adapter each, share one base, and give the evidence of the serial path."""

import os
import shutil
import time
from pathlib import Path

import pytest
import ray
import torch
from base_samples import save_packed
from ray_samples import save_tiny_bert, session_on
from safetensors.torch import load_file, save_file

from icm_ray.adapters import load_adapter, open_all
from icm_ray.base_model.loading import fingerprint_weights, load_base
from icm_ray.base_model.states import batches_of, make_batches, tokenize
from icm_ray.distributed.actors import AdapterSource
from icm_ray.distributed.evidence import evidence_key, gather_on_ray
from icm_ray.distributed.scores import ScoreItem, load_scores, score_on_ray
from icm_ray.distributed.session import Pool
from icm_ray.errors import InputError
from icm_ray.evaluation.heads import Head
from icm_ray.evaluation.scoring import TaskData, evaluate
from icm_ray.evidence.gather import gather
from icm_ray.suites import SUITES

BATCH = 8
TASKS = ("year", "depth")


@pytest.fixture(scope="module")
def session(tiny_bert, ray_session):
    return session_on(tiny_bert, cpus_per_worker=0.25, workers=4, timeout_seconds=300)


@pytest.fixture(scope="module")
def pool(session):
    with session.pool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def files(adapters):
    return open_all(adapters)


@pytest.fixture(scope="module")
def inputs(files):
    texts = SUITES["text"].load("year", "calibration", 60).texts
    return {f.name: (texts[i : i + 20 + i], 24) for i, f in enumerate(files)}


def part_of(pool, start, stop):
    """Return some of a pool's actors as a pool."""
    part = Pool(pool.session, stop - start)
    part.__dict__["actors"] = pool.actors[start:stop]
    return part


def base_fingerprint(actor):
    """Return the sha256 of the base as an actor sees it now."""

    def read(self):
        return fingerprint_weights(self.base.weights())

    return ray.get(actor.__ray_call__.remote(read), timeout=120)


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


def anonymous_bytes(pid: int) -> int:
    """Return the memory that is a process's own; pages of files are everybody's."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def equal(found, expected):
    assert (found.task, found.fingerprint) == (expected.task, expected.fingerprint)
    assert torch.equal(found.task_vector, expected.task_vector)
    assert found.expert_ratios == expected.expert_ratios
    assert found.base_ratios == expected.base_ratios
    assert found.inputs == expected.inputs


@pytest.mark.slow
def test_an_actor_unpacks_a_quantised_base_as_the_serial_path_does(
    ray_session, tiny_bert, files, inputs, tmp_path, one_thread
):
    save_packed(tiny_bert, tmp_path / "packed", 4)
    base, file = load_base(tmp_path / "packed"), files[0]
    batches = batches_of(base.reader, *inputs[file.name], BATCH)
    expected = gather(base.model, load_adapter(file.path, file.name), batches)
    session = session_on(tmp_path / "packed", cpus_per_worker=0.25, workers=1, timeout_seconds=300)
    with session.pool(1) as pool:
        found = gather_on_ray(pool, [file], {file.name: inputs[file.name]}, BATCH)
    equal(found[0], expected)


def test_any_number_of_actors_gives_the_serial_evidence(pool, files, inputs, tiny_bert, one_thread):
    base = load_base(tiny_bert)
    expected = []
    for file in files:
        texts, tokens = inputs[file.name]
        ids = tokenize(base.tokenizer, texts, tokens)
        batches = make_batches(ids, BATCH, base.tokenizer.pad_token_id)
        expected.append(gather(base.model, load_adapter(file.path, file.name), batches))
    for count in (1, 2):
        # Given backwards and with more adapters than actors: neither shows in the result.
        found = gather_on_ray(part_of(pool, 0, count), files[::-1], inputs, BATCH)
        assert [e.task for e in found] == sorted(file.name for file in files)
        for one, other in zip(found, expected, strict=True):
            equal(one, other)
        assert all(0 < e.task_vector.norm() < 100 for e in found)
    last = gather_on_ray(part_of(pool, 0, 1), files[:1], inputs, BATCH, "last")[0]
    assert not torch.equal(last.task_vector, found[0].task_vector)
    assert last.expert_ratios == found[0].expert_ratios


def test_each_adapter_changes_its_own_evidence(pool, files, inputs):
    found = gather_on_ray(pool, files, inputs, BATCH)
    vectors = [e.task_vector for e in found]
    assert all(not torch.equal(a, b) for i, a in enumerate(vectors) for b in vectors[i + 1 :])
    assert set(found[4].expert_ratios) < set(found[0].expert_ratios)  # values only


def test_two_actors_work_at_the_same_time(pool, files):
    pids = {pid_of(actor) for actor in pool.actors}
    assert len(pids) == 2
    assert os.getpid() not in pids
    texts = SUITES["text"].load("year", "train", 1500).texts
    since = time.time() * 1e6
    inputs = {file.name: (texts, 24) for file in files}
    gather_on_ray(part_of(pool, 0, 2), files[:2], inputs, BATCH)
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


@pytest.mark.slow
def test_an_extra_actor_costs_less_than_a_quarter_of_the_base(pool, ray_session, tmp_path):
    base = save_tiny_bert(tmp_path, rows=1_300_000)
    large = session_on(base, cpus_per_worker=0.25, workers=1)
    assert large.shared.bytes > 80_000_000
    with large.pool(1) as alone:
        (actor,) = alone.actors
        assert base_fingerprint(actor) == large.shared.fingerprint
        without = min(anonymous_bytes(pid_of(one)) for one in pool.actors)
        assert anonymous_bytes(pid_of(actor)) - without < large.shared.bytes / 4


@pytest.mark.slow
def test_actors_start_when_they_are_needed_and_end_with_the_pool(session, files, inputs):
    with session.pool(2) as pool:
        assert pool.map("evidence", {}) == {}
        assert "actors" not in vars(pool), "nothing was to be done"
        gather_on_ray(pool, files[:1], inputs, BATCH)
        (actor, *_) = pool.actors
    with pytest.raises(ray.exceptions.RayActorError):
        wait_for_the_end(actor)


def wait_for_the_end(actor) -> None:
    for _ in range(300):  # a killed actor may still answer what reached it first
        ray.get(actor.__ray_ready__.remote(), timeout=60)
        time.sleep(0.1)


def test_scores_are_the_serial_ones_and_kept_by_content(
    pool, session, files, data, tiny_bert, tmp_path, one_thread
):
    items = [ScoreItem("base", None, TASKS), ScoreItem("one", AdapterSource(files[0]), TASKS)]
    items.append(ScoreItem("one task", AdapterSource(files[1]), ("year",)))
    found = score_on_ray(pool, items, data, tmp_path, BATCH)
    base = load_base(tiny_bert)
    adapter = load_adapter(files[0].path, files[0].name)
    for label, one in (("base", None), ("one", adapter)):
        expected = evaluate(base, one, data, batch=BATCH)
        for task in TASKS:
            assert found[label][task].score == expected[task].score
            assert (found[label][task].predictions == expected[task].predictions).all()
    assert list(found["one task"]) == ["year"]
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    idle = Pool(session, 1)
    again = score_on_ray(idle, items, data, tmp_path, BATCH)
    assert "actors" not in vars(idle), "no actor is needed any more"
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == stamps
    assert again["one"]["year"].score == found["one"]["year"].score
    # Other examples are another score.
    fewer = {
        t: TaskData(d.task, SUITES["text"].load(t, "validation", 20), d.head)
        for t, d in data.items()
    }
    key = items[0].key(session.key, data, BATCH)
    assert items[0].key(session.key, fewer, BATCH) != key
    assert load_scores(tmp_path / key[:20])["year"].score == found["base"]["year"].score


def test_the_shared_base_stays_as_it_was(pool, session, files, inputs, data, tmp_path):
    gather_on_ray(pool, files, inputs, BATCH)
    score_on_ray(pool, [ScoreItem("a", AdapterSource(files[2]), TASKS)], data, tmp_path, BATCH)
    assert {base_fingerprint(actor) for actor in pool.actors} == {session.shared.fingerprint}


def test_an_actor_holds_one_adapter_at_a_time(pool, files, inputs):
    first, second = (AdapterSource(file) for file in files[:2])
    actor = pool.actors[0]
    for source in (first, second, second):
        texts, tokens = inputs[source.name]
        ray.get(actor.evidence.remote(source, texts, tokens, BATCH), timeout=60)
        held = ray.get(actor.__ray_call__.remote(lambda self: self.held[1].name), timeout=60)
        assert held == source.name


def test_an_adapter_that_changes_during_the_job_is_refused(pool, files, inputs, tmp_path):
    folder = shutil.copytree(files[0].path, tmp_path / "changing")
    (file,) = open_all([("task0", folder)])
    gather_on_ray(part_of(pool, 0, 1), [file], inputs, BATCH)
    weights = folder / "adapter_model.safetensors"
    save_file({n: t * 2 for n, t in load_file(weights).items()}, weights, metadata={"format": "pt"})
    # Another actor, which has not read it yet.
    with pytest.raises(InputError, match="changed while the job ran") as caught:
        gather_on_ray(part_of(pool, 1, 2), [file], inputs, BATCH)
    assert str(folder) in str(caught.value)


def test_evidence_is_keyed_by_all_that_it_is_made_from(session, adapters, files, inputs, tmp_path):
    def key(base=session.key, files=files, inputs=inputs, batch=BATCH):
        return evidence_key(base, files, inputs, batch)

    (other,) = open_all([("task0", adapters[1][1])])
    fewer = {**inputs, "task0": (inputs["task0"][0][:5], 24)}
    keys = {key(), key(base="x"), key(batch=9), key(files=[other]), key(inputs=fewer)}
    assert len(keys) == 5
    moved = [(name, shutil.copytree(path, tmp_path / name)) for name, path in adapters[::-1]]
    assert key(files=open_all(moved)) == key()
