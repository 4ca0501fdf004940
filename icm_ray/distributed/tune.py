"""Ray Tune runs the trials: Optuna asks through a searcher of ours, ASHA stops early.

A trial is a small process that only waits: it sends its setting to one of the actors that hold the
base for the whole search, and reports what comes back. It asks the cluster for memory and for no
CPU, so it can never take the place of an actor it waits for.

Tune pickles its own state as it goes. It does so into a private folder that is deleted with the
run, and nothing of it is ever read: the search's memory is the ledger.
"""

import contextlib
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from icm_ray.distributed.cluster import fetch
from icm_ray.distributed.loggers import logger
from icm_ray.errors import ClusterError
from icm_ray.search.ledger import Trial
from icm_ray.search.objectives import AIMS
from icm_ray.search.study import Study

TRIAL_MEMORY = 200_000_000
"""Bytes that a trial's own process reserves; it holds no tensors."""
RUNG, STEPS_OF_LEARNING = "rung", "steps"


@dataclass(frozen=True)
class Looks:
    """How a trial is measured, a little first or all at once.

    Attributes:
        on: What a rung counts: "examples" or "steps".
        rungs: Growing; the last one is everything.
        factor: One trial of so many goes on from each rung.
    """

    on: str
    rungs: tuple[int, ...]
    factor: int = 2

    def orders(self) -> list[dict[str, Any]]:
        """Return what each rung asks of an actor."""
        return [{RUNG: rung, self.on: rung} for rung in self.rungs]


@dataclass(frozen=True)
class Bench:
    """Where trials are measured.

    Attributes:
        actors: With `measure(material, order)`, as `AdapterActor` has it.
        material: Handed on to them; see `trials.share_material`.
    """

    actors: Sequence[Any]
    material: Sequence[Any]


@dataclass(frozen=True)
class TrialsOrder:
    """How trials are run.

    Attributes:
        looks: The rungs.
        trials: Number of trials, those of earlier runs included.
        timeout: Longest wait for one measurement, seconds.
        loggers: Names of Tune's loggers to feed.
        logs: Where event files of loggers go, if there are any.
    """

    looks: Looks
    trials: int
    timeout: float
    loggers: tuple[str, ...] = ()
    logs: Path | None = None


def run_trials(
    study: Study,
    bench: Bench,
    order: TrialsOrder,
    finished: Callable[[Trial], None] = lambda _trial: None,
) -> None:
    """Run trials until the ledger holds as many as are wanted; at most one an actor at a time.

    Args:
        study: Asks and is told.
        bench: Where they are measured.
        order: How they are run.
        finished: Told of each trial when it ends.

    Raises:
        ClusterError: an actor died more often than it is restarted, or did not answer in time.
    """
    searcher = _Asker(study, len(bench.actors), order, finished)
    if searcher.rest <= 0:
        return
    check_placement(len(bench.actors))
    run = tune.with_resources(
        tune.with_parameters(
            _trial_function(),
            actors=list(bench.actors),
            material=list(bench.material),
            timeout=order.timeout,
        ),
        tune.PlacementGroupFactory([{"memory": TRIAL_MEMORY}]),
    )
    if order.logs:
        order.logs.mkdir(parents=True, exist_ok=True)
    with _private_folder(order.logs) as folder, _quiet_tune():
        tuner = tune.Tuner(
            run,
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                scheduler=_scheduler(study, order.looks),
                num_samples=searcher.rest,
                max_concurrent_trials=None,  # the searcher hands out one trial an actor
                reuse_actors=True,
                trial_dirname_creator=lambda trial: f"trial-{trial.trial_id}",
            ),
            run_config=tune.RunConfig(
                name="search",
                storage_path=str(folder),
                verbose=0,
                callbacks=[logger(name, order.logs or folder) for name in order.loggers],
            ),
        )
        tuner.fit()
    if searcher.broken:
        raise ClusterError(
            f"search: {searcher.broken}. Finished trials are kept; run the same command again."
        )


def wait_for_actors(actors: Sequence[Any], timeout: float) -> None:
    """Wait until every actor holds the base; say so if the cluster has no room.

    Raises:
        ClusterError: some were not placed in time.
    """
    calls = [actor.__ray_ready__.remote() for actor in actors]
    done, waiting = ray.wait(calls, num_returns=len(calls), timeout=timeout)
    if waiting:
        free = ", ".join(f"{k} {v:g}" for k, v in sorted(ray.available_resources().items()))
        raise ClusterError(
            f"search: {len(waiting)} of {len(calls)} places for trials were not there within "
            f"{timeout:g} s. Free in the cluster: {free or 'nothing'}. Lower resources.workers, "
            "or wait for other jobs."
        )
    for call in done:
        fetch(call, "search")


def check_placement(count: int) -> None:
    """Raise ClusterError if the trials' own small processes have no memory to reserve."""
    held = [int(n["Resources"].get("memory", 0) // TRIAL_MEMORY) for n in ray.nodes() if n["Alive"]]
    if sum(held) < count:
        raise ClusterError(
            f"search: {count} trials reserve {TRIAL_MEMORY / 1e6:.0f} MB each but the cluster's "
            f"nodes have memory for {sum(held)}. Lower resources.workers."
        )


def _trial_function() -> Callable[..., None]:
    # Nested, so that it travels by value: a trial's process need not import torch to wait.
    def trial(
        config: dict[str, Any], actors: list[Any], material: list[Any], timeout: float
    ) -> None:
        import ray
        from ray import tune

        seconds = 0.0
        for look in config["looks"]:
            order = {name: look.get(name) for name in ("examples", "steps")}
            order |= {name: config[name] for name in ("setting", "objectives")}
            call = actors[config["slot"]].measure.remote(material, order)
            outcome: dict[str, Any] = ray.get(call, timeout=timeout)  # type: ignore[assignment]
            seconds = outcome["seconds"] = outcome["seconds"] + seconds
            tune.report({"rung": look["rung"], **outcome, **outcome.get("metrics", {})})
            if "error" in outcome:
                return

    return trial


class _Asker(Searcher):
    """Between Tune and the study; what it knows is in the ledger, so it saves nothing itself."""

    def __init__(
        self, study: Study, slots: int, order: TrialsOrder, finished: Callable[[Trial], None]
    ) -> None:
        name = study.objectives[0]
        super().__init__(metric=name, mode=_mode(name))
        self.study, self.looks, self.finished = study, order.looks, finished
        self.rest = order.trials - len(study.finished())
        self.free = list(range(slots))
        self.flying: dict[str, tuple[int, int]] = {}
        self.broken = ""

    def suggest(self, trial_id: str) -> Any:
        """Return the next trial's order; None while every actor is busy."""
        if self.broken or self.rest <= 0:
            return Searcher.FINISHED
        if not self.free:
            return None
        asked = self.study.ask()
        slot = self.free.pop(0)
        self.flying[trial_id] = (asked.number, slot)
        self.rest -= 1
        return {
            "number": asked.number,
            "point": dict(asked.point),
            "setting": plain_setting(self.study, asked),
            "objectives": list(self.study.objectives),
            "looks": self.looks.orders(),
            "slot": slot,
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Note what a rung measured."""
        if trial_id in self.flying and "error" not in result:
            number, _ = self.flying[trial_id]
            self.study.report(number, int(result[RUNG]), _part(result, "metrics"))

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Close a trial; its actor is free again."""
        if trial_id not in self.flying:
            return
        number, slot = self.flying.pop(trial_id)
        self.free.append(slot)
        if error or not result or RUNG not in result:
            self.broken = f"trial {number}: no answer from the actor that measured it"
            return
        last = int(result[RUNG]) >= self.looks.rungs[-1]
        state = "failed" if "error" in result else "complete" if last else "stopped"
        outcome = {key: result[key] for key in ("node", "seconds", "error") if key in result}
        outcome |= {key: _part(result, key) for key in ("metrics", "scores")}
        self.finished(self.study.tell(number, state=state, **outcome))

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the ledger is the memory."""

    def restore(self, checkpoint_path: str) -> None:
        """Refuse: nothing was saved here."""
        raise NotImplementedError("the ledger is the memory")

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Save nothing: the ledger is the memory."""


def _part(result: Mapping[str, Any], name: str) -> dict[str, float]:
    """Return one of a result's tables; Tune hands them over flattened, as `<name>/<key>`."""
    return {k.removeprefix(f"{name}/"): v for k, v in result.items() if k.startswith(f"{name}/")}


def plain_setting(study: Study, trial: Trial) -> dict[str, Any]:
    """Return a trial's setting as plain data."""
    return asdict(study.space.setting(trial.point))


def _mode(objective: str) -> str:
    return "max" if AIMS[objective].direction == "maximize" else "min"


def _scheduler(study: Study, looks: Looks) -> TrialScheduler:
    """Return ASHA that knows every earlier trial's rungs; nothing is stopped with one rung."""
    if len(looks.rungs) == 1:
        return FIFOScheduler()
    name = study.objectives[0]
    scheduler = AsyncHyperBandScheduler(
        time_attr=RUNG,
        metric=name,
        mode=_mode(name),
        grace_period=looks.rungs[0],
        reduction_factor=looks.factor,
        max_t=looks.rungs[-1],
        stop_last_trials=False,
    )
    controller: Any = None  # it takes one and looks at none
    for trial in study.finished():
        known: Any = SimpleNamespace(trial_id=f"earlier-{trial.number}")
        scheduler.on_trial_add(controller, known)
        for rung, value in sorted(trial.rungs.items(), key=lambda item: int(item[0])):
            scheduler.on_trial_result(controller, known, {RUNG: int(rung), name: value})
    return scheduler


@contextlib.contextmanager
def _private_folder(logs: Path | None) -> Iterator[Path]:
    """Yield a folder for Tune; of all it leaves there only event files are kept."""
    folder = Path(tempfile.mkdtemp(prefix="icm_ray-tune-"))  # mode 0700
    try:
        yield folder
        for file in folder.rglob("events.out.tfevents*") if logs else ():
            place = Path(str(logs)) / file.parent.name
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, place / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _quiet_tune() -> Iterator[None]:
    """Let signals and loggers be ours: Tune has a SIGINT handler and three loggers of its own."""
    wanted: Mapping[str, str] = {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial reports an error instead
        "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_GLOBAL_CHECKPOINT_S": "3600",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    # It looks for the files of those loggers in the end, and warns that there are none.
    analysis = logging.getLogger("ray.tune.analysis.experiment_analysis")
    level = analysis.level
    analysis.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # ASHA's first trial at a rung is compared with nobody.
            warnings.filterwarnings("ignore", "All-NaN slice", RuntimeWarning)
            yield
    finally:
        analysis.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
