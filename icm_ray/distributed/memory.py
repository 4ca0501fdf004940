"""Memory of merges on Ray: all of our processes, weighed while many adapters are merged."""

import contextlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import ray

from icm_ray.adapters import open_all
from icm_ray.config import Resources
from icm_ray.distributed.cluster import connected
from icm_ray.distributed.merge import merge_on_ray
from icm_ray.merging.order import MergeRequest

INTERVAL = 0.15
"""Least seconds between two samples: weighing walks page tables, and a module takes longer."""


@dataclass(frozen=True)
class ManyRow:
    """Memory of one merge of many adapters, summed over our processes.

    PSS counts a page that n processes share as 1/n of a page in each.

    Attributes:
        method: Label of the merge.
        adapters: How many were merged.
        input_bytes: Size of their weight files.
        seconds: Wall time of checking, merging and collecting.
        peak: Largest sum of PSS over the driver and all workers, bytes.
        net: `peak` less `bare`.
        bare: PSS of the same workers before they ran any code of ours.
        driver: PSS of the driver at the peak.
        workers: Most workers seen at once.
        growth: `net` over that of the same method with the fewest adapters.
    """

    method: str
    adapters: int
    input_bytes: int
    seconds: float
    peak: int
    net: int
    bare: int
    driver: int
    workers: int
    growth: float = 1.0


def merge_many(
    folders: Sequence[Path], request: MergeRequest, resources: Resources, label: str
) -> ManyRow:
    """Merge adapters on a local cluster while memory is sampled.

    Args:
        folders: The adapters; each is named after its folder.
        request: What is asked for.
        resources: What each worker gets.
        label: What the row calls the merge.
    """
    with connected(resources):
        bare = _bare_workers(resources.workers or 1)
        with Sampler() as sampler:
            started = time.monotonic()
            files = open_all([(folder.name, folder) for folder in folders])
            merge_on_ray(files, request, resources)
            seconds = time.monotonic() - started
        workers = max(sampler.workers, 1)
        print(f"{label}: {len(files)} adapters, peak {sampler.peak / 1e6:.0f} MB", flush=True)
        return ManyRow(
            method=label,
            adapters=len(files),
            input_bytes=sum(file.bytes for file in files),
            seconds=seconds,
            peak=sampler.peak,
            net=sampler.peak - workers * bare,
            bare=workers * bare,
            driver=sampler.driver,
            workers=workers,
        )


def _bare_workers(count: int) -> int:
    """Start `count` workers that import nothing of ours and return the PSS of one."""

    def wait() -> None:  # nested, so it travels by value and the worker does not import this file
        time.sleep(0.5)

    ray.get([ray.remote(wait).remote() for _ in range(count)])
    sizes = [_pss(process) for process in _workers(psutil.Process())]
    return sum(sizes) // max(len(sizes), 1)


class Sampler:
    """Samples, in a thread, the PSS of this process and of the Ray workers below it.

    Raylet, GCS and Ray's agents are Ray's own and stay out.

    Attributes:
        peak: Largest sum seen, bytes.
        driver: This process's share of it.
        workers: Most workers seen at once.
        largest: Most that one worker held, bytes.
    """

    def __init__(self) -> None:
        self.peak = self.driver = self.workers = self.largest = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Sampler":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        me = psutil.Process()
        workers: list[psutil.Process] = []
        for turn in range(10**9):
            started = time.monotonic()
            if turn % 5 == 0:  # looking for new processes costs more than weighing known ones
                workers = _workers(me)
            own = _pss(me)
            sizes = [_pss(process) for process in workers]
            total = own + sum(sizes)
            self.largest = max(self.largest, *sizes, 0)
            self.workers = max(self.workers, sum(size > 0 for size in sizes))
            if total > self.peak:
                self.peak, self.driver = total, own
            # A large base has many pages: weighing it must not take the time of what is weighed.
            if self._stop.wait(max(INTERVAL, 5 * (time.monotonic() - started))):
                return


def _workers(driver: psutil.Process) -> list[psutil.Process]:
    workers = []
    for process in driver.children(recursive=True):
        with contextlib.suppress(psutil.Error, IndexError):
            title = process.cmdline()[0]
            if title.startswith("ray::") and "Agent" not in title:
                workers.append(process)
    return workers


def _pss(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().pss
    except psutil.Error:  # it ended between two looks
        return 0
