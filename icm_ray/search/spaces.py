"""Which names a recipe may search, and the merge that a point of the space stands for.

method                     choice of methods; what follows may then begin with one of them
params.<name>              any parameter of the method, any step around it
weights.<task>, weights.*  one number a task
layers.<group>, layers.*   one number a group of blocks, g0 next to the input, times the weights
layers.*.*                 one number a group and task
rank                       the output rank
learn.<part>.<key>         any setting of a learner
fusion.<key>, fusion.<part>.<key>   any setting of the Fusion-VAE of icm_fusion
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from icm_ray.config import SearchRow
from icm_ray.errors import RecipeError
from icm_ray.fusion.serial import fusion_spec_of
from icm_ray.learning.recipes import LEARNERS, spec_of
from icm_ray.merging.cut import RankRule
from icm_ray.methods import METHODS, find_method
from icm_ray.search.defaults import default_space
from icm_ray.search.distributions import Dimension, Value, parse

PARTS = ("params", "weights", "layers", "rank", "learn", "fusion")
Point = Mapping[str, Value]
"""Values by searched name."""


@dataclass(frozen=True)
class Setting:
    """One merge: what a trial makes.

    Attributes:
        method: A name in METHODS.
        params: The method's parameters, weights included.
        rank: The output rank policy.
        learn: Changes to the learner's recipe.
        fusion: Changes to the Fusion-VAE's recipe.
    """

    method: str
    params: Mapping[str, Any] = field(default_factory=dict)
    rank: int | str | None = None
    learn: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fusion: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fuses(self) -> bool:
        """Whether a Fusion-VAE is trained first."""
        return METHODS[self.method].needs == "fusion_model"

    @property
    def learns(self) -> bool:
        """Whether coefficients are learned first."""
        return self.method in LEARNERS


@dataclass(frozen=True)
class Space:
    """The names and values of one search; `suggest` is define-by-run.

    Attributes:
        row: What is fixed.
        methods: Methods that may be chosen; one, if it is fixed.
        dimensions: By full name, wildcards expanded.
        tasks: Names of the adapters.
        groups: Number of layer groups.
    """

    row: SearchRow
    methods: tuple[str, ...]
    dimensions: Mapping[str, Dimension]
    tasks: tuple[str, ...]
    groups: int

    def suggest(self, trial: Any) -> dict[str, Value]:
        """Return a point: the method first if it is searched, then what applies to it."""
        point: dict[str, Value] = {}
        if "method" in self.dimensions:
            point["method"] = self.dimensions["method"].suggest(trial, "method")
        for name, dimension in self.of(str(point.get("method", self.methods[0]))).items():
            point[name] = dimension.suggest(trial, name)
        return point

    @property
    def by_group(self) -> bool:
        """Whether layer groups have numbers of their own."""
        return any(_bare(name).startswith("layers.") for name in self.dimensions)

    def of(self, method: str) -> dict[str, Dimension]:
        """Return the dimensions that apply once a method is chosen."""
        return {n: d for n, d in self.dimensions.items() if _applies(n, method)}

    def setting(self, point: Point) -> Setting:
        """Return the merge a point stands for, on top of what is fixed."""
        method = str(point.get("method", self.methods[0]))
        params = {k: v for k, v in self.row.params.items() if k in METHODS[method].accepted()}
        learn = deepcopy(self.row.learn)
        fusion = deepcopy(self.row.fusion)
        layers: dict[str, float] = {}
        weights: dict[str, float] = {}
        rank: Any = self.row.rank
        for name, value in point.items():
            part, _, rest = _bare(name).partition(".")
            if part == "params":
                params[rest] = value
            elif part == "weights":
                weights[rest] = float(value or 0.0)
            elif part == "layers":
                layers[rest] = float(value or 0.0)
            elif part == "rank":
                rank = value
            elif part == "learn":
                section, _, key = rest.partition(".")
                learn.setdefault(section, {})[key] = value
            elif part == "fusion":
                *sections, key = rest.split(".")
                place = fusion
                for section in sections:
                    place = place.setdefault(section, {})
                place[key] = value
        if layers:
            params["weights"] = {task: self._by_group(task, layers, weights) for task in self.tasks}
        elif weights:
            params["weights"] = weights
        learns = method in LEARNERS
        fuses = METHODS[method].needs == "fusion_model"
        return Setting(method, params, rank, learn if learns else {}, fusion if fuses else {})

    def _by_group(
        self, task: str, layers: Mapping[str, float], weights: Mapping[str, float]
    ) -> list[float]:
        """Return a task's weight in each layer group, as a merge recipe has it."""
        whole = [layers.get(f"g{i}", 1.0) * weights.get(task, 1.0) for i in range(self.groups)]
        return [layers.get(f"g{i}.{task}", weight) for i, weight in enumerate(whole)]


def space_of(row: SearchRow, tasks: Sequence[str], groups: int) -> Space:
    """Return a row's space, every name and every end of a range checked against the methods.

    Args:
        row: What is fixed and what is searched.
        tasks: Names of the adapters.
        groups: Number of layer groups.

    Raises:
        RecipeError: all unknown names and values out of range.
    """
    fixed = dict(row.search)
    methods = (row.method,)
    problems: list[str] = []
    dimensions: dict[str, Dimension] = {}
    if "method" in fixed:
        dimensions["method"] = _parsed("method", fixed.pop("method"), problems)
        methods = tuple(map(str, dimensions["method"].choices))
    for method in methods:
        try:
            find_method(method)
        except RecipeError as error:
            problems += [f"search.method: {line}" for line in error.problems]
    if problems:
        raise RecipeError(problems)
    for name, text in _with_defaults(row, methods, fixed).items():
        dimension = _parsed(name, text, problems)
        for full in _expanded(name, tasks, groups):
            dimensions[full] = dimension
    space = Space(row, methods, dimensions, tuple(tasks), groups)
    problems += _problems(space)
    if problems:
        raise RecipeError(dict.fromkeys(problems))
    return space


def _with_defaults(
    row: SearchRow, methods: Sequence[str], given: Mapping[str, Any]
) -> dict[str, Any]:
    space: dict[str, Any] = {}
    for method in methods if row.space == "default" else ():
        prefix = f"{method}." if len(methods) > 1 else ""
        for name, text in default_space(method).items():
            set_already = name in given or name.removeprefix("params.") in row.params
            if not set_already and f"{prefix}{name}" not in given:
                space[f"{prefix}{name}"] = text
    return {**space, **given}


def _parsed(name: str, text: object, problems: list[str]) -> Dimension:
    try:
        return parse(text)
    except RecipeError as error:
        problems += [f"search.{name}: {line}" for line in error.problems]
        return Dimension("choice", choices=(None,))


def _expanded(name: str, tasks: Sequence[str], groups: int) -> list[str]:
    owner, bare = name[: len(name) - len(_bare(name))], _bare(name)
    known = {"weights": list(tasks), "layers": _layers(tasks, groups)}
    part, _, pattern = bare.partition(".")
    if part not in known or "*" not in pattern:
        return [name]
    depth = pattern.count(".")
    fits = [k for k in known[part] if k.count(".") == depth and fnmatchcase(k, pattern)]
    return [f"{owner}{part}.{k}" for k in fits] or [name]


def _layers(tasks: Sequence[str], groups: int) -> list[str]:
    """Return every name that may follow `layers.`."""
    names = [f"g{i}" for i in range(groups)]
    return names + [f"{name}.{task}" for name in names for task in tasks]


def _bare(name: str) -> str:
    """Return a name without the method it begins with."""
    first, _, rest = name.partition(".")
    return rest if first in METHODS and rest else name


def _applies(name: str, method: str) -> bool:
    bare = _bare(name)
    if bare != name and not name.startswith(f"{method}."):
        return False
    part, _, rest = bare.partition(".")
    takes = METHODS[method].accepted()
    return {
        "params": rest in takes,
        "weights": "weights" in takes,
        "layers": "weights" in takes,
        "rank": True,
        "learn": method in LEARNERS,
        "fusion": METHODS[method].needs == "fusion_model",
    }.get(part, False)


def _problems(space: Space) -> list[str]:
    """Return what is wrong with the names and with both ends of every range."""
    problems = [
        _unknown(name, space)
        for name in space.dimensions
        if name != "method" and not any(_applies(name, method) for method in space.methods)
    ]
    groups = _layers(space.tasks, space.groups)
    parts = {name: _bare(name).partition(".") for name in space.dimensions}
    problems += [
        f"search.{name}: no such layer group. Known: {', '.join(groups)}."
        for name, (part, _, rest) in parts.items()
        if part == "layers" and rest not in groups
    ]
    known = {name for method in space.methods for name in METHODS[method].accepted()}
    problems += [f"params.{name}: no such parameter." for name in set(space.row.params) - known]
    if not space.dimensions and not space.row.grid:
        problems.append(
            "search: empty but names and distributions are expected, or space: default."
        )
    for method in space.methods:
        dimensions = space.of(method)
        plain = {name: d.corners()[0] for name, d in dimensions.items()}
        points = [plain, *({**plain, n: v} for n, d in dimensions.items() for v in d.corners())]
        for point in points:
            problems += _refusals(space.setting({**point, "method": method}), space.tasks)
    return problems


def _unknown(name: str, space: Space) -> str:
    methods = ", ".join(space.methods)
    takes = sorted({p for method in space.methods for p in METHODS[method].accepted()})
    return (
        f"search.{name}: nothing of {methods} is called so. Known: "
        f"{', '.join(f'params.{p}' for p in takes)}, weights.<task>, rank; layers.<group>; "
        "learn.<part>.<key> for learned methods; fusion.<part>.<key> for icm_fusion."
    )


def _refusals(setting: Setting, tasks: Sequence[str]) -> list[str]:
    """Return why a setting cannot be merged."""
    problems = []
    try:
        row = find_method(setting.method)
        row.bind(setting.params, tasks)
        if setting.learns:
            spec_of(setting.method, setting.learn)
        if setting.fuses:
            fusion_spec_of(setting.fusion)
        RankRule.parse(setting.rank, row.default_rank, 1)
    except RecipeError as error:
        problems += [f"search: {line}" for line in error.problems]
    return problems
