"""What is asked of a cluster, what is said when it has not got it, and waits that end."""

import time

import pytest
import ray

from icm_ray.config import Resources
from icm_ray.distributed.cluster import (
    check_fits,
    connected,
    fetch,
    run_bounded,
    worker_count,
    worker_options,
)
from icm_ray.distributed.faults import MAX_RETRIES
from icm_ray.errors import ClusterError, ICMRayError, InputError


@ray.remote(num_cpus=0.1)
def say(value, seconds=0.0, error=None):
    time.sleep(seconds)
    if error is not None:
        raise error
    return value


@ray.remote
class Held:
    def gpus(self):
        return ray.get_gpu_ids()

    def resources(self):
        return ray.get_runtime_context().get_assigned_resources()


def calls(**values):
    return {name: (lambda _slot, v=value: say.remote(*v)) for name, value in values.items()}


def test_a_request_says_all_that_one_worker_needs():
    assert worker_options(Resources()) == {"num_cpus": 1.0, "num_gpus": 0.0}
    found = worker_options(
        Resources(
            cpus_per_worker=2, gpus_per_worker=0.5, memory_per_worker=10**9, custom={"slot": 1.0}
        )
    )
    assert found == {
        "num_cpus": 2,
        "num_gpus": 0.5,
        "memory": 10**9,
        "resources": {"slot": 1.0},
    }


@pytest.mark.parametrize(
    ("resources", "items", "expected"),
    [
        (Resources(), 9, 4),
        (Resources(), 3, 3),
        (Resources(workers=2), 9, 2),
        (Resources(workers=9), 9, 4),
        (Resources(cpus_per_worker=0.5), 99, 8),
        (Resources(cpus_per_worker=3), 9, 1),
        (Resources(cpus_per_worker=0, gpus_per_worker=1), 9, 2),
        (Resources(cpus_per_worker=0, gpus_per_worker=0.5), 9, 4),
        (Resources(cpus_per_worker=0, gpus_per_worker=0.25), 99, 8),
        # Two GPUs hold four parts of 0.4, not the five that 2 / 0.4 promises.
        (Resources(cpus_per_worker=0, gpus_per_worker=0.4), 9, 4),
        (Resources(cpus_per_worker=0, gpus_per_worker=0.75), 9, 2),
        (Resources(cpus_per_worker=0.1, custom={"slot": 1.0}), 9, 3),
        (Resources(cpus_per_worker=0, workers=7), 9, 7),
        (Resources(), 0, 1),
    ],
)
def test_as_many_workers_as_fit_and_no_more(resources, items, expected):
    assert worker_count(resources, items) == expected


def test_memory_bounds_the_number_of_workers():
    memory = int(ray.cluster_resources()["memory"])
    half = Resources(cpus_per_worker=0, memory_per_worker=memory // 2 - 10**6)
    assert worker_count(half, 9) == 2


def test_what_fits_passes():
    check_fits(Resources(cpus_per_worker=4, gpus_per_worker=2, device="cuda", custom={"slot": 3.0}))


@pytest.mark.parametrize(
    ("resources", "words"),
    [
        (Resources(cpus_per_worker=64), "CPU 64 (largest node has 4)"),
        (Resources(gpus_per_worker=3, device="cuda"), "GPU 3 (largest node has 2)"),
        (Resources(custom={"tpu": 1.0}), "tpu 1 (largest node has 0)"),
        (Resources(memory_per_worker=10**15), "memory 1e+15"),
    ],
)
def test_what_never_fits_is_said_before_any_work(resources, words):
    with pytest.raises(ClusterError) as caught, connected(resources):
        pytest.fail("the body must not run")
    assert words in str(caught.value)
    assert "Lower resources: in the recipe" in str(caught.value)
    assert caught.value.exit_code == 5


def test_an_open_session_is_used_and_left_open():
    with connected(Resources()):
        assert ray.is_initialized()
    assert ray.is_initialized()
    assert ray.get(say.remote(1), timeout=60) == 1


def test_two_actors_share_one_gpu():
    whole = Held.options(
        **worker_options(Resources(cpus_per_worker=0, gpus_per_worker=1.0))
    ).remote()
    half = worker_options(Resources(cpus_per_worker=0, gpus_per_worker=0.5))
    halves = [Held.options(**half).remote() for _ in range(2)]
    alone, *shared = ray.get([a.gpus.remote() for a in (whole, *halves)], timeout=120)
    assert len(alone) == len(shared[0]) == 1
    assert shared[0] == shared[1] != alone
    found = ray.get(halves[0].resources.remote(), timeout=60)
    assert found["GPU"] == 0.5
    for actor in (whole, *halves):
        ray.kill(actor)


def test_custom_resources_are_assigned():
    options = worker_options(Resources(cpus_per_worker=0.5, custom={"slot": 2.0}))
    actor = Held.options(**options).remote()
    found = ray.get(actor.resources.remote(), timeout=60)
    assert (found["CPU"], found["slot"]) == (0.5, 2.0)
    ray.kill(actor)


def test_results_come_in_the_order_of_the_calls_and_are_told_as_they_come(tmp_path):
    @ray.remote(num_cpus=0.1)
    def wait_for(path):
        while not path.exists():
            time.sleep(0.02)
        return "A"

    seen = []

    def done(key, value):
        seen.append((key, value))
        (tmp_path / key).touch()

    waiting = {"a": lambda _slot: wait_for.remote(tmp_path / "b")}  # ends only once b is told
    order = {**waiting, **calls(b=("B",), c=("C",), d=("D",))}
    found = run_bounded([None] * 2, order, timeout=60, done=done)
    assert list(found.items()) == [("a", "A"), ("b", "B"), ("c", "C"), ("d", "D")]
    assert sorted(seen) == list(found.items())
    assert seen[0] == ("b", "B")


def test_never_more_calls_in_flight_than_workers():
    flying, most = set(), []

    def call(name):
        def start(_slot):
            flying.add(name)
            most.append(len(flying))
            return say.remote(name, 0.05)

        return start

    run_bounded(
        [None] * 2,
        {str(i): call(str(i)) for i in range(7)},
        timeout=60,
        done=lambda key, _value: flying.discard(key),
    )
    assert max(most) == 2


def test_nothing_to_do_is_done():
    assert run_bounded([None], {}, timeout=1) == {}


def test_a_wait_that_runs_out_names_what_is_missing():
    with pytest.raises(ClusterError) as caught:
        run_bounded(
            [None] * 2, calls(quick=("q",), stuck=("s", 60.0), later=("l", 60.0)), timeout=3
        )
    assert "stuck, later" in str(caught.value)
    assert "3 s" in str(caught.value)
    assert "run the same command again" in str(caught.value)
    assert caught.value.exit_code == 5


def test_our_errors_come_through_as_themselves():
    with pytest.raises(InputError) as caught:
        run_bounded([None], calls(a=("a", 0, InputError(["one", "two"]))), timeout=60)
    assert type(caught.value) is InputError
    assert caught.value.problems == ("one", "two")


def test_a_bug_in_a_worker_is_not_taken_for_a_fault_of_the_cluster():
    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        run_bounded([None], calls(a=("a", 0, KeyError("bug"))), timeout=60)
    assert not isinstance(caught.value, ICMRayError)


def test_a_worker_that_dies_each_time_is_given_up_with_its_name():
    @ray.remote(num_cpus=0.1, max_retries=1)
    def die():
        import os

        os._exit(3)

    with pytest.raises(ClusterError, match="poison: lost after") as caught:
        fetch(die.remote(), "poison")
    assert caught.value.exit_code == 5
    assert MAX_RETRIES == 3
