"""Optuna between the ledger and whoever runs trials: ask, report, tell.

The study lives in memory and is rebuilt from the ledger, so what is on disk is plain JSON. Every
question gets a sampler of its own, seeded by the trial's number: a search that was killed asks for
the same points as one that was not.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from icm_ray.errors import RecipeError
from icm_ray.search.distributions import Value
from icm_ray.search.ledger import Ledger, Trial
from icm_ray.search.objectives import better, directions
from icm_ray.search.spaces import Space
from icm_ray.seeding import seed_for

Start = tuple[str, Mapping[str, Value]]
"""Name and values of a point to try before the sampler's own."""


def optuna() -> Any:
    """Return the library, quiet.

    Raises:
        RecipeError: it is not installed.
    """
    try:
        import optuna as library
    except ImportError:
        raise RecipeError(
            "search: needs the package optuna. Install it with pip install 'icm-ray[search]'."
        ) from None
    library.logging.set_verbosity(library.logging.ERROR)
    return library


class Study:
    """One search's questions and answers."""

    def __init__(
        self,
        ledger: Ledger,
        space: Space,
        objectives: Sequence[str],
        *,
        sampler: str,
        startup: int,
        seed: int,
        starts: Sequence[Start] = (),
    ) -> None:
        """Rebuild the study from the ledger.

        Args:
            ledger: Trials so far; those that were running are asked for again, first.
            space: What is searched.
            objectives: Names in AIMS.
            sampler: "tpe", "gp" or "random".
            startup: Trials at random before the sampler looks at results.
            seed: Keys every draw.
            starts: Points of the first trials.
        """
        self.ledger, self.space, self.objectives = ledger, space, tuple(objectives)
        self.sampler, self.startup, self.seed = sampler, startup, seed
        self.starts = list(starts)
        self.optuna = optuna()
        quiet = self.optuna.samplers.RandomSampler(seed=0)
        self.study = self.optuna.create_study(directions=directions(objectives), sampler=quiet)
        self.asked: dict[int, Any] = {}
        for trial in ledger.in_order():
            if trial.state != "running":
                self._pose(trial.number, trial.point)
                self._answer(trial)
        self.waiting = [t.number for t in ledger.in_order() if t.state == "running"]

    def ask(self) -> Trial:
        """Return the next trial: an interrupted one, a start point, or the sampler's choice."""
        if self.waiting:
            trial = self.ledger.trials[self.waiting.pop(0)]
            self._pose(trial.number, trial.point)
            return self.ledger.change(trial.number, rungs={}, metrics={})
        number = max(self.ledger.trials, default=-1) + 1
        self.study.sampler = self._sampler(number)
        origin, point = self.starts[number] if number < len(self.starts) else ("sampler", None)
        return self.ledger.put(Trial(number, self._pose(number, point), origin))

    def report(self, number: int, rung: int, metrics: Mapping[str, float]) -> None:
        """Note what was measured at a rung."""
        value = metrics.get(self.objectives[0], math.nan)
        trial = self.ledger.trials[number]
        self.ledger.change(number, rungs={**trial.rungs, str(rung): value}, metrics=dict(metrics))

    def tell(self, number: int, **fields: Any) -> Trial:
        """Close a trial; one whose objectives are not all finite numbers has failed."""
        trial = self.ledger.trials[number]
        known = [fields.get("metrics", trial.metrics).get(n, math.nan) for n in self.objectives]
        if fields.get("state") != "failed" and not all(map(math.isfinite, known)):
            wrong = [n for n, v in zip(self.objectives, known, strict=True) if not math.isfinite(v)]
            fields |= {"state": "failed", "error": f"{', '.join(wrong)}: no finite number"}
        trial = self.ledger.change(number, **fields)
        self._answer(trial)
        return trial

    def finished(self) -> list[Trial]:
        """Return the trials that are not running."""
        return [trial for trial in self.ledger.in_order() if trial.state != "running"]

    def complete(self) -> list[Trial]:
        """Return the trials that were measured on everything."""
        return [trial for trial in self.ledger.in_order() if trial.state == "complete"]

    def best(self) -> Trial | None:
        """Return the complete trial with the best first objective; the earliest of equals."""
        name, found = self.objectives[0], None
        for trial in self.complete():
            if found is None or better(name, trial.metrics[name], found.metrics[name]):
                found = trial
        return found

    def front(self) -> list[Trial]:
        """Return the complete trials that no other beats in every objective, by number."""
        done = self.complete()
        return [t for t in done if not any(_dominates(self.objectives, o, t) for o in done)]

    def importance(self) -> dict[str, float]:
        """Return the share of the first objective's variance that each name explains (fANOVA).

        Empty with fewer than four complete trials, equal values, or nothing that all of them share.
        """
        name = self.objectives[0]
        values = {trial.metrics[name] for trial in self.complete()}
        if len(self.complete()) < 4 or len(values) < 2:
            return {}
        many = len(self.objectives) > 1
        evaluator = self.optuna.importance.FanovaImportanceEvaluator(
            seed=seed_for(self.seed) % 2**32
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = self.optuna.importance.get_param_importances(
                    self.study,
                    evaluator=evaluator,
                    target=(lambda trial: trial.values[0]) if many else None,
                )
            except (ValueError, RuntimeError):
                return {}
        return {str(k): float(v) for k, v in found.items()}

    def _pose(self, number: int, point: Mapping[str, Value] | None) -> dict[str, Value]:
        """Ask Optuna, with the values given or its own; returns the whole point."""
        if point is not None:
            self.study.enqueue_trial(dict(point))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.asked[number] = self.study.ask()
            return self.space.suggest(self.asked[number])

    def _answer(self, trial: Trial) -> None:
        asked = self.asked.pop(trial.number)
        states = self.optuna.trial.TrialState
        if trial.state == "failed":
            self.study.tell(asked, state=states.FAIL)
        elif trial.state == "stopped":
            for rung, value in sorted(trial.rungs.items(), key=lambda item: int(item[0])):
                asked.report(value, int(rung))
            self.study.tell(asked, state=states.PRUNED)
        else:
            self.study.tell(asked, trial.values(self.objectives))

    def _sampler(self, number: int) -> Any:
        samplers = self.optuna.samplers
        seed = seed_for("search", self.seed, number) % 2**32
        if self.sampler == "random" or (number < self.startup and self.sampler == "gp"):
            return samplers.RandomSampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # options Optuna calls experimental
            if self.sampler == "gp":
                return samplers.GPSampler(
                    seed=seed,
                    n_startup_trials=self.startup,
                    deterministic_objective=True,
                    warn_independent_sampling=False,
                )
            return samplers.TPESampler(
                seed=seed,
                n_startup_trials=self.startup,
                multivariate=True,
                group="method" in self.space.dimensions,
                warn_independent_sampling=False,
            )


def _dominates(objectives: Sequence[str], one: Trial, other: Trial) -> bool:
    pairs = [(n, one.metrics[n], other.metrics[n]) for n in objectives]
    return any(better(n, a, b) for n, a, b in pairs) and not any(
        better(n, b, a) for n, a, b in pairs
    )
