"""What runs out says what and how much; what kills its workers is named, and the rest goes on."""

import errno
import os
import re
import subprocess
import sys
from dataclasses import fields

import pytest
import ray
from ray.exceptions import (
    ActorDiedError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    WorkerCrashedError,
)
from ray_samples import ROOT, environment

from icm_ray.adapters import AdapterFile, open_all
from icm_ray.config import Resources
from icm_ray.distributed.cluster import connected, fetch, run_bounded
from icm_ray.distributed.faults import MAX_LOST, as_ours, lost_work
from icm_ray.distributed.merge import merge_on_ray
from icm_ray.errors import ClusterError, InputError, ResourceError
from icm_ray.merging.order import MergeRequest

LOW = (
    "Task was killed due to the node running low on memory.\nMemory on the node (IP: 1.2.3.4) was "
    "22.80GB / 23.00GB (0.99), which exceeds the memory usage threshold of 0.95."
)


@ray.remote(num_cpus=0.1, max_retries=0)
def end(value, error=None):
    if value == "poison":
        os._exit(3)
    if error:
        raise error
    return value


@ray.remote(num_cpus=0.1)
class Worker:
    def end(self, value):
        if value == "poison":
            os._exit(3)
        return value


def on_tasks(*values):
    return {v: lambda _slot, v=v: end.remote(v) for v in values}


def on_actors(*values):
    return {v: lambda actor, v=v: actor.end.remote(v) for v in values}


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (
            ObjectStoreFullError("Object size is 9 bytes."),
            ResourceError,
            r"full \(Object size is 9",
        ),
        (OutOfDiskError("x"), ResourceError, r"x: the object store is full .* has \d+ bytes free"),
        (OutOfMemoryError(LOW), ResourceError, r"22\.80GB / 23\.00GB .* Use fewer workers"),
        (WorkerCrashedError(), ClusterError, "x: lost after 3 retries .* run the same command"),
        (ActorDiedError(), ClusterError, r"x: lost after 3 retries \(ActorDiedError"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_of_ray_s_is_said_for_what_it_is(error, kind, words):
    ours = as_ours(error, "x")
    assert type(ours) is kind
    assert re.search(words, str(ours))


def test_an_actor_that_ran_out_of_memory_is_no_fault_of_the_cluster():
    error = ActorDiedError()
    error.error_msg = f"The actor died unexpectedly before finishing this task.\n{LOW}"
    assert type(as_ours(error, "x")) is ResourceError


def test_what_has_no_meaning_of_its_own_stays_as_it_is():
    bug, ours = KeyError("bug"), InputError("one")
    assert as_ours(bug, "x") is bug
    assert as_ours(ours, "x") is ours


def test_a_full_disk_of_a_worker_comes_back_with_its_path():
    full = OSError(errno.ENOSPC, "No space left on device", "/data/out")
    with pytest.raises(OSError, match="No space left") as caught:
        fetch(end.remote("a", full), "a")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "/data/out")
    assert not isinstance(caught.value, ray.exceptions.RayError)


def test_what_ray_raises_in_a_body_is_ours_at_the_end():
    with pytest.raises(ClusterError, match="cluster: lost"), connected(Resources()):
        ray.get(end.remote("poison"))
    with pytest.raises(ray.exceptions.RayTaskError), connected(Resources()):
        ray.get(end.remote("a", KeyError("bug")))


def test_others_work_is_kept_and_what_died_is_named():
    seen = []

    def keep(key, _result):
        seen.append(key)

    calls = on_tasks("a", "poison", "b", "c")
    with pytest.raises(ClusterError, match="scores: poison: lost after 3 retries") as caught:
        run_bounded(
            [None] * 2, calls, timeout=120, label="scores", done=lambda k, _: seen.append(k)
        )
    assert sorted(seen) == ["a", "b", "c"]
    assert caught.value.exit_code == 5
    assert len(caught.value.problems) == 1


def test_an_actor_that_is_lost_gets_no_more_work():
    seen = []
    calls = on_actors("poison", *"abcdef")
    workers = [Worker.remote() for _ in range(2)]
    with pytest.raises(ClusterError, match="poison: lost") as caught:
        run_bounded(workers, calls, timeout=120, done=lambda k, _: seen.append(k))
    assert sorted(seen) == list("abcdef")
    assert len(caught.value.problems) == 1
    with pytest.raises(ClusterError, match="poison: lost") as caught:
        run_bounded([Worker.remote()], calls, timeout=120)
    assert caught.value.problems[1] == "workers: 6 more pieces of work were not begun."
    ray.kill(workers[1])


def test_what_is_lost_is_bounded_and_said_once_a_cause():
    error = lost_work({f"piece {i}": WorkerCrashedError() for i in range(MAX_LOST)}, 7)
    assert len(error.problems) == 2
    assert error.problems[0].endswith("(And 2 more.)")
    assert type(lost_work({"a": OutOfMemoryError(LOW)}, 0)) is ResourceError


def poisonous(file, module):
    """Return an open adapter that kills whoever reads one of its modules."""

    class Poisonous(AdapterFile):
        def factors(self, name):
            if name == module:
                os._exit(3)
            return super().factors(name)

    return Poisonous(**{f.name: getattr(file, f.name) for f in fields(file) if f.init})


@pytest.mark.long
@pytest.mark.parametrize("method", ["soup", "ties"])
def test_a_poison_shard_names_module_and_adapter(ray_session, adapters, method):
    files = open_all(adapters[:2])
    module = sorted(files[1].shapes)[1]
    bad = poisonous(files[1], module)
    request = MergeRequest(method, {}, None)
    with pytest.raises(ClusterError) as caught:
        merge_on_ray([files[0], bad], request, Resources(cpus_per_worker=0.5))
    assert caught.value.problems == (
        f"adapter 'task1' ({files[1].path}): module {module!r}: every worker that reads it dies. "
        "Copy the adapter anew, or leave it out, and run the same command again.",
    )
    assert caught.value.exit_code == 5


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "settings", "words"),
    [
        ("put", {"RAY_local_fs_capacity_threshold": "0.0001"}, "the object store is full"),
        ("return", {"RAY_local_fs_capacity_threshold": "0.0001"}, "the object store is full"),
        ("memory", {"RAY_memory_usage_threshold": "0.02"}, "test: a piece: out of memory"),
    ],
)
def test_what_runs_out_ends_with_code_4(kind, settings, words):
    """The store is 80 MB and its disk counts as full; or any use of memory counts as too much."""
    settings = {**settings, "RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": "80000000"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "distributed" / "exhausted.py"), kind],
        env=environment(**settings),
        capture_output=True,
        text=True,
        timeout=500,
    )
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 4, done.stderr[-3000:]
    assert len(errors) == 1
    assert words in errors[0]
    assert "internal" not in errors[0]
