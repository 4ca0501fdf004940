"""What a search will take: what its trials share, some of its own first trials, and the best."""

import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from operator import mul
from pathlib import Path
from statistics import fmean

import torch

from icm_ray.config import INPUT_BATCH, EngineSpec, FusionSpec, LearnSpec, SearchRecipe
from icm_ray.config.places import earlier_output
from icm_ray.distributed.evidence import EVIDENCE_BATCH, input_widths
from icm_ray.distributed.tune import Looks
from icm_ray.evaluation.scoring import BATCH, task_data
from icm_ray.evidence.tensors import Evidence, as_evidence
from icm_ray.fusion.serial import Checkpoints, fusion_spec_of, objectives_of
from icm_ray.fusion.train import optimizer_of, train_step
from icm_ray.learning.recipes import spec_of
from icm_ray.learning.tasks import LearnerData, learner_data
from icm_ray.merging.estimate import warnings_of
from icm_ray.search.ledger import Ledger
from icm_ray.search.measuring import Material, Measurer
from icm_ray.search.objectives import LABEL_FREE
from icm_ray.search.plan import Plan, Search, key_of, searches_of, study_of, trials_of
from icm_ray.search.spaces import Setting
from icm_ray.types import Adapter
from icm_ray.workflows.pipeline.offer import SECONDS_A_MERGE
from icm_ray.workflows.plan.fusion import stages_seconds, training_of, with_vectors
from icm_ray.workflows.plan.measured import FEW, Bench
from icm_ray.workflows.plan.planned import LOOKS, JobPlan, count, grams_of
from icm_ray.workflows.search.run import asked_of, looks_of
from icm_ray.workflows.train_fusion import FusionMaterial

TRIED = 4
"""Trials of a search that are made, on a few examples each."""
TUNE_SECONDS = 5.0
"""Start and end of Ray Tune: an estimate, of two processes one after the other, that of trials
among them, on a machine that does nothing else."""


def plan_search(recipe: SearchRecipe) -> tuple[Bench, JobPlan]:
    """Make the first trials' merges, and score one of them on a few examples."""
    plan, base = asked_of(recipe)
    adapters = [file.load() for file in plan.files]
    bench = Bench(base, recipe.resources)
    trials = _Trials(bench, plan, adapters)
    seconds, numbers = trials.shared(), []
    spent = 0.0
    for search, many, settings in _first_trials(plan):
        looks = looks_of(recipe, search)
        spent += many * fmean(trials.seconds(setting, looks) for setting in settings)
        numbers.append(many)
    seconds[f"{sum(numbers)} trials"] = spent
    seconds["the best"] = trials.best(len(numbers))
    items, grams, warnings = max(len(plan.files), *numbers), 0, warnings_of(plan.files)
    if plan.needs_grams:
        grams, warnings = grams_of(recipe, plan.files)
    starts = TUNE_SECONDS * len(numbers)
    return bench, JobPlan(seconds, items, starts=starts, gathered=grams, warnings=tuple(warnings))


def _first_trials(plan: Plan) -> list[tuple[Search, int, list[Setting]]]:
    """Return each search with its number of trials and the settings of its first ones."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for search in searches_of(plan, Path(folder, "search")):
            ledger = Ledger(search.folder, key_of(plan, search))
            study = study_of(plan, search, ledger, partial(earlier_output, plan.recipe.storage))
            many = trials_of(plan.recipe, search, study)
            points = [study.ask().point for _ in range(min(many, TRIED))]
            found.append((search, many, [search.space.setting(point) for point in points]))
    return found


class _Trials:
    """What trials cost, by what they share: inputs, examples, and evidence of a few of them."""

    def __init__(self, bench: Bench, plan: Plan, adapters: Sequence[Adapter]) -> None:
        self.bench, self.plan, self.adapters = bench, plan, adapters
        recipe, tasks = plan.recipe, [file.name for file in plan.files]
        self.data, self.forward = LearnerData({}), 0.0
        if plan.needs_inputs:
            assert recipe.data is not None, "checked with the plan"
            self.data = learner_data(recipe.data, tasks, plan.objectives, plan.experts)
            self.forward = bench.forward(self.data, EVIDENCE_BATCH)
        self.scored, self.one = 0, 0.0
        if plan.is_scored:
            few = task_data(plan.suite, plan.experts, "validation", FEW)
            self.one = bench.scored(few, BATCH, adapters[0])
        self.known, self.pair = Checkpoints([], {}), 0.0
        if plan.needs_fusion:
            read = Checkpoints.read(adapters, plan.trajectories, {})
            self.known, self.pair = with_vectors(bench, read, adapters, self.data)
        self.material = Material(
            adapters=adapters,
            grams=self._grams() if plan.needs_grams else None,
            seed=recipe.seed,
            threads=recipe.resources.threads,
        )

    def _grams(self) -> Evidence | None:
        """Return Gram statistics that say nothing: a merge takes as long with them as with all."""
        widths = input_widths(self.plan.files)
        wholes = {width: torch.eye(width) for width in {*widths.values()}}
        tasks = [adapter.name for adapter in self.adapters]
        return as_evidence({f"{m}.gram.{t}": wholes[w] for m, w in widths.items() for t in tasks})

    def shared(self) -> dict[str, float]:
        """Return the seconds of what all trials share, by stage."""
        found = {}
        if self.plan.needs_grams:
            one = self.bench.grams(self.plan.files, self.data, EVIDENCE_BATCH)
            found["gram statistics"] = one * count(self.data)
        if self.plan.needs_fusion:
            found["task vectors"] = self.pair * count(self.data)
        if self.plan.needs_scores:
            found["base and experts"] = 2 * self.one * self._examples("validation")
        return found

    def seconds(self, setting: Setting, looks: Looks) -> float:
        """Return what a trial takes, as far as one of its kind goes on the average."""
        made, measured = shares(looks)
        return made * self.making(setting) + measured * self._measuring

    def making(self, setting: Setting) -> float:
        """Return what a setting's merge takes, with what is learned or trained for it."""
        if setting.learns:
            return self._learning(spec_of(setting.method, setting.learn))
        if setting.fuses:
            return self._fusing(fusion_spec_of(setting.fusion))
        return self.bench.timed(lambda: Measurer(self.bench.base, self.material).merged(setting))

    def _learning(self, spec: LearnSpec) -> float:
        how, data = spec.optimisation, self.data.seen_by(spec.objective)
        steps = how.steps * how.batch * len(self.adapters)
        return steps * self.bench.step(spec, self.adapters, data) + LOOKS * self.forward * count(
            data
        )

    def _fusing(self, spec: FusionSpec) -> float:
        tasks = [
            one
            for objective in objectives_of(spec)
            for one in self.data.seen_by(objective).batched(
                self.adapters, self.bench.base.reader, INPUT_BATCH
            )
        ]
        material = FusionMaterial(spec, EngineSpec(), self.adapters, self.known, tasks)
        meta = training_of(self.bench, material)
        return stages_seconds(self.bench, spec, partial(train_step, meta, optimizer_of(meta)))

    @property
    def _measuring(self) -> float:
        recipe = self.plan.recipe
        labelled = self.one * self._examples("validation") if self.plan.needs_scores else 0.0
        free = sum(name in LABEL_FREE for name in recipe.objectives)
        return labelled + free * self.forward * count(self.data)

    def best(self, searches: int) -> float:
        """Return what the best merge of each search takes: made again, written and scored."""
        plan = self.plan
        validation = self._examples("validation")
        test = self._examples("test") if plan.recipe.test else 0
        references = 2 * (test if plan.needs_scores else test + validation)
        return self.one * (searches * (validation + test) + references) + searches * SECONDS_A_MERGE

    def _examples(self, split: str) -> int:
        """Return how many examples of a split all tasks have together."""
        plan, recipe = self.plan, self.plan.recipe
        most = recipe.test if split == "test" else plan.suite.limit(recipe.validation, recipe.most)
        return sum(most or plan.suite.count(task, split) for task in plan.experts)


def shares(looks: Looks) -> tuple[float, float]:
    """Return how much of its making and of its measuring a trial gets through on the average.

    Of the trials at each rung one of `factor` goes on. On examples it is made once and measured
    anew; on steps it learns on from where it was, and is measured on everything.
    """
    going = [looks.factor**-number for number in range(len(looks.rungs))]
    reached = [rung / looks.rungs[-1] for rung in looks.rungs]
    if looks.on != "steps":
        return 1.0, sum(map(mul, going, reached))
    more = [share - before for before, share in pairwise([0.0, *reached])]
    return sum(map(mul, going, more)), sum(going)
