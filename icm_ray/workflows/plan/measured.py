"""What one worker will need, measured here: the recipe's own base on a few of its own inputs."""

import math
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from icm_ray.adapters import AdapterFile
from icm_ray.base_model.shared_base import share_base
from icm_ray.base_model.states import batches_of, pooled
from icm_ray.config import LearnSpec, Resources, StartSpec
from icm_ray.distributed.session import Session
from icm_ray.evaluation.scoring import TaskData, evaluate
from icm_ray.evidence.grams import Grams, gather_grams
from icm_ray.finetuning.expert import Lesson
from icm_ray.finetuning.training import train_experts
from icm_ray.learning.gradients import TaskGradients
from icm_ray.learning.learner import covered_tasks
from icm_ray.learning.recipes import plan_of
from icm_ray.learning.tasks import LearnerData
from icm_ray.linalg.threads import kernel_threads
from icm_ray.types import Adapter

FEW = 16
"""Inputs of a task that are run."""
STEPS = 4
"""Of experts that are trained."""
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Trained:
    """What training a group of experts takes.

    Attributes:
        start: Seconds before the first step: examples are read, adapters are made.
        step: Seconds of a step.
        numbers: How many are trained, heads left out.
    """

    start: float
    step: float
    numbers: int


class Bench:
    """A base that is held as a worker would hold it, to see what work on it takes."""

    def __init__(self, path: Path, resources: Resources) -> None:
        """Load the base; until then this process holds what a driver does."""
        self.bare = peak_bytes()
        started = time.monotonic()
        self.session = Session(resources, share_base(path))
        self.base = self.session.load_base()
        self.start_seconds = time.monotonic() - started

    def forward(self, data: LearnerData, batch: int) -> float:
        """Return the seconds of one unlabelled input through the base."""
        few = {task: (inputs[:FEW], tokens) for task, (inputs, tokens) in data.inputs.items()}
        parts = [batches_of(self.base.reader, *one, batch) for one in few.values()]

        def run() -> None:
            with torch.no_grad():
                for batches in parts:
                    for one in batches:
                        pooled(self.base.model, one)

        return self.timed(run) / sum(len(inputs) for inputs, _ in few.values())

    def grams(self, files: Sequence[AdapterFile], data: LearnerData, batch: int) -> float:
        """Return the seconds of one input whose Gram statistics are gathered.

        One adapter's first pass is made, with its sums; the others, which find no room beside them,
        are reckoned to take as long.
        """
        adapter = files[0].load()
        inputs, tokens = data.inputs[adapter.name]
        batches = batches_of(self.base.reader, inputs[:FEW], tokens, batch)
        modules = sorted({module for file in files for module in file.shapes})
        directions, found = self.resources.gram_directions, list[Grams]()

        def run() -> None:
            found.clear()
            found.append(
                gather_grams(self.base.model, adapter, modules, batches, directions),
            )

        spent = self.timed(run) / len(inputs[:FEW])
        return spent * math.ceil(len(modules) / (len(modules) - len(found[0].left)))

    def scored(
        self, data: Mapping[str, TaskData], batch: int, adapter: Adapter | None = None
    ) -> float:
        """Return the seconds of one example that is scored; see `scoring.evaluate`."""
        threads = self.resources.threads
        spent = self.timed(lambda: evaluate(self.base, adapter, data, batch=batch, threads=threads))
        return spent / sum(len(one.examples) for one in data.values())

    def step(self, spec: LearnSpec, adapters: Sequence[Adapter], data: LearnerData) -> float:
        """Return the seconds of one input in a learner's step, forward and backward.

        A start that needs Gram statistics, which are gathered later, costs a step nothing.
        """
        spec = spec.model_copy(update={"start": StartSpec()})
        how = spec.optimisation
        tasks = data.first(how.batch).batched(adapters, self.base.reader, how.batch)
        learning = plan_of(spec, adapters).learning(self.base)
        covered = covered_tasks(tasks, learning.objective)
        one = covered[0]
        side = TaskGradients(self.base.model, learning, tasks, covered=covered)
        side.start(one)
        seen = sum(len(b.rows) for b in side.tasks[one].batches) / len(side.tasks[one].batches)
        return self.timed(lambda: side.gradient([one], 0)) / seen

    def training(self, lessons: Sequence[Lesson]) -> "Trained":
        """Train a group of experts for a few steps; the last one, which is kept, does not count."""
        ends: list[float] = []

        def stepped(_step: int, _losses: list[float]) -> None:
            self._wait()
            ends.append(time.monotonic())

        short = {"steps": STEPS, "checkpoints": 1}
        few = [
            replace(one, job=replace(one.job, training=one.job.training.model_copy(update=short)))
            for one in lessons
        ]
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch, kernel_threads(self.resources.threads):
            model = train_experts(self.base, few, Path(scratch), stepped)[0].model
        numbers = sum(leaf.numel() for leaf in model.parameters() if leaf.requires_grad)
        model.unload()  # the next group finds the base bare
        step = (ends[-2] - ends[0]) / (STEPS - 2)
        return Trained(ends[0] - started - step, step, numbers)

    def timed(self, run: Callable[[], object]) -> float:
        """Return what a second run takes; the first one touches the base's pages."""
        spent = 0.0
        with kernel_threads(self.resources.threads):
            for _ in range(2):
                started = time.monotonic()
                run()
                self._wait()
                spent = time.monotonic() - started
        return spent

    def _wait(self) -> None:
        if self.resources.device != "cpu":
            torch.cuda.synchronize(self.resources.device)

    @property
    def resources(self) -> Resources:
        """What a worker gets."""
        return self.session.resources

    @property
    def mapped(self) -> int:
        """Bytes that all workers of a node share: pages of the base and of libraries."""
        return _status("RssFile")

    @property
    def device_bytes(self) -> int:
        """Bytes of the device's own memory that were held at most."""
        if self.resources.device == "cpu":
            return 0
        return torch.cuda.max_memory_allocated(self.resources.device)


def peak_bytes() -> int:
    """Return the most memory this process has held."""
    # What `getrusage` says may be the parent's, so it serves only where Linux says nothing.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return _status("VmHWM") or (peak if sys.platform == "darwin" else 1024 * peak)


def _status(key: str) -> int:
    """Return bytes that Linux tells of this process; 0 on another system."""
    if not STATUS.is_file():
        return 0
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])
