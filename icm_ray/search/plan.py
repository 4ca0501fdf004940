"""A search's recipe, checked against methods, adapters and what there is to judge trials by."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from icm_ray.adapters import AdapterFile, open_all
from icm_ray.adapters.blocks import runs_of
from icm_ray.config import AdapterRef, LearnSpec, ObjectiveSpec, SearchRecipe, SearchRow
from icm_ray.errors import RecipeError
from icm_ray.evaluation.experts import Expert, find_experts, heads_of, ready_experts
from icm_ray.files import sha256_of
from icm_ray.fusion.material import hashes_of, trajectories_in
from icm_ray.fusion.serial import fusion_spec_of, objectives_of
from icm_ray.learning.objectives import reads_heads
from icm_ray.learning.recipes import LEARNERS, needs_grams, spec_of
from icm_ray.learning.tasks import headless
from icm_ray.methods import find_method
from icm_ray.search.ledger import Ledger
from icm_ray.search.objectives import AIMS, LABEL_FREE, SCORED
from icm_ray.search.spaces import Space, space_of
from icm_ray.search.starting import starts_of
from icm_ray.search.study import Study
from icm_ray.suites import Suite, allowing, find_suite

VERSION = 3


@dataclass(frozen=True)
class Plan:
    """A checked recipe.

    Attributes:
        recipe: The recipe.
        files: The adapters, opened and checked.
        refs: The same, as recipes name them.
        experts: Experts by task; empty without heads.
        rows: What is searched, each with its space.
    """

    recipe: SearchRecipe
    files: list[AdapterFile]
    refs: list[AdapterRef]
    experts: Mapping[str, Expert]
    rows: list[tuple[SearchRow, Space]]

    @property
    def suite(self) -> Suite:
        """The suite merges are scored on."""
        with allowing(self.recipe.allow_code):  # a trial's process is not the one that was told
            return find_suite(str(self.recipe.suite))

    @property
    def trajectories(self) -> dict[str, Path]:
        """Folders of the adapters' checkpoints by task, if the recipe names some."""
        return trajectories_in(self.recipe.trajectories, self.files)

    @property
    def proven(self) -> list[AdapterFile]:
        """The adapters whose tasks the suite has."""
        return [file for file in self.files if file.name in self.experts]

    @property
    def is_scored(self) -> bool:
        """Whether the best merge can be scored."""
        return self.recipe.suite is not None and bool(self.experts)

    @property
    def methods(self) -> set[str]:
        """Every method that a trial may merge with."""
        return {method for _, space in self.rows for method in space.methods}

    @cached_property
    def learners(self) -> list[LearnSpec]:
        """Every recipe that a trial may learn with, before its own settings."""
        return [
            spec_of(method, row.learn)
            for row, space in self.rows
            for method in space.methods
            if method in LEARNERS
        ]

    @cached_property
    def objectives(self) -> list[ObjectiveSpec]:
        """All that trials minimise or are measured by on unlabelled inputs."""
        fused = [fusion_spec_of(row.fusion) for row, space in self.rows if _fuses(space)]
        aims: list[Any] = [name for name in self.recipe.objectives if name in LABEL_FREE]
        return [
            *(spec.objective for spec in self.learners),
            *(objective for spec in fused for objective in objectives_of(spec)),
            *(ObjectiveSpec(kind=name) for name in aims),
        ]

    @property
    def needs_fusion(self) -> bool:
        """Whether a trial trains a Fusion-VAE."""
        return any(_fuses(space) for _, space in self.rows)

    @property
    def needs_grams(self) -> bool:
        """Whether a method or a learner's start needs Gram statistics."""
        return any(map(needs_grams, self.learners)) or any(
            find_method(method).needs == "gram_statistics" for method in self.methods
        )

    @property
    def needs_inputs(self) -> bool:
        """Whether something looks at unlabelled inputs."""
        return self.needs_grams or self.needs_fusion or bool(self.objectives)

    @property
    def needs_scores(self) -> bool:
        """Whether trials are judged by scores on validation data."""
        return bool(set(self.recipe.objectives) & set(SCORED))


def _fuses(space: Space) -> bool:
    return any(find_method(method).needs == "fusion_model" for method in space.methods)


@dataclass(frozen=True)
class Search:
    """One of a recipe's searches.

    Attributes:
        row: What is fixed and searched.
        space: The same, checked.
        seed: Seed of the sampler; None for the grid, which draws nothing.
        folder: Where it is kept.
        output: The same as recipes name it.
    """

    row: SearchRow
    space: Space
    seed: int | None
    folder: Path
    output: str


def plan_of(recipe: SearchRecipe) -> Plan:
    """Check a recipe against methods, adapters and what is there to judge trials by.

    Raises:
        RecipeError: all that does not go together.
        InputError: adapters or experts are missing or broken.
    """
    suite = find_suite(recipe.suite) if recipe.suite is not None else None
    experts: Mapping[str, Expert] = {}
    if recipe.experts:
        experts = find_experts(Path(recipe.experts))
    elif suite is not None:
        given = ready_experts(ref.pair for ref in recipe.adapters)
        experts = {name: expert for name, expert in given.items() if name in suite}
    refs = recipe.adapters or [
        AdapterRef(name=task, path=str(expert.adapter)) for task, expert in experts.items()
    ]
    if not refs:
        raise RecipeError("adapters: none. Name some, or experts: a folder that holds them.")
    pairs = [ref.pair for ref in refs]
    files = open_all(pairs, recipe.modules_to_save, base=recipe.base, run_by="jobs.search")
    tasks = [file.name for file in files]
    given = recipe.rows or [recipe.row()]
    rows = [(row, space_of(row, tasks, recipe.layer_groups)) for row in given]
    plan = Plan(recipe, files, refs, {t: experts[t] for t in tasks if t in experts}, rows)
    if problems := _problems(plan, tasks):
        raise RecipeError(problems)
    return plan


def _problems(plan: Plan, tasks: Sequence[str]) -> list[str]:
    recipe, problems = plan.recipe, []
    names = [row.name for row, _ in plan.rows]
    problems += [
        f"rows: {n!r} twice. Set labels." for n in sorted(set(names)) if names.count(n) > 1
    ]
    if len(set(recipe.objectives)) < len(recipe.objectives):
        problems.append("objectives: one is named twice.")
    heads = any(map(reads_heads, plan.objectives))
    unproven = sorted(set(tasks) - set(plan.experts))
    if recipe.experts is None and recipe.suite is not None and plan.experts and not heads:
        missing = ""  # what has no task is merged all the same
    else:
        missing = ", ".join(unproven) if recipe.suite else "suite"
    if (heads or plan.needs_scores or recipe.test is not None) and missing:
        problems.append(
            f"suite, experts: scores and heads are asked for, but {missing} has none. Name a suite "
            "with every adapter's task, and their experts or adapters that lie with their heads."
        )
    if recipe.suite is not None and plan.is_scored:
        problems += headless(plan.suite, plan.experts)
    if plan.needs_inputs and recipe.data is None:
        problems.append("data: missing but an objective or method looks at unlabelled inputs.")
    only = {find_method(method).needs for method in plan.methods} == {"fusion_model"}
    if not only and (aims := [o for o in recipe.objectives if AIMS[o].needs == "fusion"]):
        problems.append(f"objectives: {', '.join(aims)}: only method icm_fusion has a Fusion-VAE.")
    if any(space.by_group for _, space in plan.rows):
        try:
            runs_of({m for file in plan.files for m in file.shapes}, recipe.layer_groups)
        except RecipeError as error:
            problems += [f"layer_groups: {line}" for line in error.problems]
    if missing := [task for task, folder in plan.trajectories.items() if not folder.is_dir()]:
        problems.append(f"trajectories: {recipe.trajectories} has no {', '.join(missing)}.")
    if recipe.resources.grams != "full" and not plan.needs_grams:
        problems.append(
            f"resources.grams: {recipe.resources.grams} but no method or start that is searched "
            "reads any. Leave it out."
        )
    if recipe.halving and len(recipe.objectives) > 1:
        problems.append("halving: stops trials by one objective, but several are named.")
    by_steps = recipe.halving is not None and recipe.halving.by == "steps"
    if by_steps and (strange := sorted(plan.methods - set(LEARNERS))):
        problems.append(f"halving.by: steps, but {', '.join(strange)} learns nothing.")
    return problems


def searches_of(plan: Plan, target: Path) -> list[Search]:
    """Return the searches: one, or for every row its grid and each seed."""
    recipe = plan.recipe
    if not recipe.rows:
        ((row, space),) = plan.rows
        return [Search(row, space, recipe.seed, target, recipe.output)]
    searches = []
    tasks = [file.name for file in plan.files]
    for row, space in plan.rows:
        runs: dict[str, tuple[Space, int | None]] = {}
        if row.grid:  # its names alone; all others stay at what the row or the method says
            choices: dict[str, str | list[Any]] = {name: list(v) for name, v in row.grid.items()}
            alone = row.model_copy(update={"search": choices, "space": None})
            runs["grid"] = space_of(alone, tasks, recipe.layer_groups), None
        runs |= {f"seed{seed}": (space, seed) for seed in recipe.seeds or [recipe.seed]}
        for name, (searched, seed) in runs.items():
            part = f"{row.name}/{name}"
            searches.append(Search(row, searched, seed, target / part, f"{recipe.output}/{part}"))
    return searches


def key_of(plan: Plan, search: Search) -> str:
    """Return whose memory a ledger is: all that decides what trials ask and measure.

    The number of trials, places and resources but the dtype are left out: a search can go on.
    """
    recipe = plan.recipe
    names = (
        "base",
        "revision",
        "suite",
        "layer_groups",
        "objectives",
        "validation",
        "sampler",
        "startup",
        "seed",
    )
    read = heads_of(plan.suite, plan.experts)[1] if plan.experts and recipe.suite else {}
    heads = {task: sha256_of(h.described) if h else None for task, h in read.items()}
    return sha256_of(
        {
            "version": VERSION,
            "dtype": recipe.resources.dtype,
            "trajectories": hashes_of(plan.trajectories),
            "row": search.row.model_dump(mode="json", exclude={"label"}),
            "sampler_seed": search.seed,
            "adapters": {file.name: file.fingerprint for file in plan.files},
            "heads": heads,
            "data": recipe.data.model_dump() if recipe.data else None,
            "start": recipe.start,
            "halving": recipe.halving.model_dump() if recipe.halving else None,
            **{name: getattr(recipe, name) for name in names},
        }
    )


def study_of(
    plan: Plan, search: Search, ledger: Ledger, place: Callable[[str], str] = str
) -> Study:
    """Return a search's study, as far as its ledger goes; see `starts_of` for `place`."""
    recipe = plan.recipe
    modules = sorted({module for file in plan.files for module in file.shapes})
    starts = (
        [("grid", point) for point in grid_of(search)]
        if search.seed is None
        else starts_of(recipe.start, search.space, modules, place)
    )
    return Study(
        ledger,
        search.space,
        recipe.objectives,
        sampler="random" if search.seed is None else recipe.sampler,
        startup=recipe.startup,
        seed=search.seed or 0,
        starts=starts,
    )


def trials_of(recipe: SearchRecipe, search: Search, study: Study) -> int:
    """Return how many trials a search has: the grid's points, or what the recipe says."""
    return len(study.starts) if search.seed is None else recipe.trials


def grid_of(search: Search) -> list[dict[str, float]]:
    """Return the points of a row's grid."""
    grid = search.row.grid
    return [dict(zip(grid, point, strict=True)) for point in product(*grid.values())]
