"""What a merge method is, and how a user's parameters are bound to its signature."""

import inspect
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from icm_ray.errors import RecipeError, did_you_mean
from icm_ray.kinds import EvidenceKind
from icm_ray.methods.source import Source, source_of
from icm_ray.methods.steps import STEPS

Family = Literal["sums", "signs and sparsity", "subspaces", "factors", "learned"]
PASSED_IN = ("context", "evidence")
"""Keyword arguments the merge provides; every other one is a parameter users set."""


@dataclass(frozen=True)
class Pass:
    """One look at every module before the merge, for what a method must know of the whole adapter.

    Attributes:
        measure: `(factors, *, context, evidence?, **params)` returning tensors by name, which are
            added up over all modules: whole numbers wherever they meet, floats in the order of the
            modules' names, so that any split over workers gives the same sums.
        conclude: `(total, *, tasks, statistics, **params)` returning what joins
            `context.statistics`, for the next pass and for the method itself; `total` has the sums,
            `tasks` all names in order, `statistics` what earlier passes concluded.
        share: Of the values, how much it usually looks at, for plans.
    """

    measure: Callable[..., Mapping[str, Any]]
    conclude: Callable[..., Mapping[str, Any]]
    share: float = 1.0


def _no_passes(**_params: Any) -> tuple[Pass, ...]:
    """Say that a method needs to know nothing beyond the module it is given."""
    return ()


def _no_warning(_count: int, **_params: Any) -> str | None:
    """Say that nothing has to be said before a merge."""
    return None


def _no_fit(_total: int) -> float:
    """Say that a method fits nothing in rounds."""
    return 0.0


@dataclass(frozen=True)
class Method:
    """One row of the METHODS table: what is said of a method, and where its code is.

    The code is a module of this folder, imported when it is first asked for. In it is a function of
    the module's own name, and beside that, where a method needs them, functions called `passes`,
    `prepare`, `warns` and `fit_flops`.

    Attributes:
        name: What recipes call it.
        formula: The result in one line of plain text.
        paper: arXiv id or package it comes from.
        use: When to choose it, in one line.
        cost: Dominant arithmetic; R is the sum of ranks.
        needs: Kind of the evidence it cannot do without, or None.
        takes: Named tensors it can be given as evidence, each with its shape and meaning; a name
            with `<task>` stands for one tensor a task.
        default_rank: "exact" or "largest input": what `output_rank=None` means.
        family: Where it stands in a list of methods.
        is_dense: The result is of full rank: deltas are visited entry by entry, in blocks, and a
            cut to a LoRA always loses some of it.
        exempt: Contract properties that do not hold, each with the reason.
        module: Its module, where that has another name than the method.
    """

    name: str
    formula: str
    paper: str
    use: str
    cost: str
    needs: EvidenceKind | None = None
    takes: Mapping[str, str] = field(default_factory=dict)
    default_rank: Literal["exact", "largest input"] = "exact"
    family: Family = "sums"
    is_dense: bool = False
    exempt: Mapping[str, str] = field(default_factory=dict)
    module: str | None = None

    @property
    def function(self) -> Callable[..., Any]:
        """The method: `(factors, *, context, evidence?, **params)`.

        It returns factors, a dense delta, or one of each task; see `types.PerTask`.
        """
        return self._code(self._module)

    @property
    def passes(self) -> Callable[..., tuple[Pass, ...]]:
        """`(**params)` says which passes over all modules come before the merge."""
        return self._code("passes", _no_passes)

    @property
    def prepare(self) -> Callable[..., Any] | None:
        """`(given, tasks, **params)` makes what the method takes from evidence of another form.

        Such a form is a model; None where evidence comes as it is used.
        """
        return self._code("prepare", None)

    @property
    def warns(self) -> Callable[..., str | None]:
        """`(count, **params)` returns what should be said before such a merge, or nothing."""
        return self._code("warns", _no_warning)

    @property
    def fit_flops(self) -> Callable[..., float]:
        """`(total)` says what one module's fit costs beside Gram products, by the sum of ranks."""
        return self._code("fit_flops", _no_fit)

    @property
    def doc(self) -> str:
        """The function's docstring."""
        return self._source.doc(self._module)

    @property
    def _module(self) -> str:
        return self.module or self.name

    @property
    def _source(self) -> Source:
        return source_of(f"{__package__}.{self._module}")

    def _code(self, name: str, *default: Any) -> Any:
        return getattr(import_module(f"{__package__}.{self._module}"), name, *default)

    def parameters(self) -> dict[str, inspect.Parameter]:
        """Return the keyword-only parameters users may set, annotations resolved."""
        return self._source.keywords(self._module, but=PASSED_IN)

    def accepted(self) -> dict[str, inspect.Parameter]:
        """Return the same, and the steps that any method takes."""
        return {**self.parameters(), **STEPS}

    def bind(self, params: Mapping[str, Any] | None, tasks: Sequence[str]) -> dict[str, Any]:
        """Return every parameter's value, and each step's that is asked for, all checked.

        Args:
            params: What the user set. A list for `weights` follows the order of `tasks`.
            tasks: Adapter names in the user's order.

        Raises:
            RecipeError: an unknown parameter, a wrong type or a value out of range; all at once.
        """
        values = dict(params or {})
        own, known = self.parameters(), self.accepted()
        problems = [
            f"params.{name}: method {self.name!r} has no such parameter but takes "
            f"{', '.join(known)}.{did_you_mean(name, known)}"
            for name in sorted(set(values) - set(known))
        ]
        known = {name: one for name, one in known.items() if name in own or name in values}
        bound: dict[str, Any] = {}
        for name, parameter in known.items():
            value = values.get(name, parameter.default)
            try:
                if name == "weights":
                    value = _weights_by_task(value, tasks)
                bound[name] = _adapter(parameter.annotation).validate_python(value)
            except ValidationError as error:
                detail = error.errors()[0]
                problems.append(f"params.{name}: {value!r}: {detail['msg']}. Method {self.name!r}.")
            except ValueError as error:
                problems.append(f"params.{name}: {error}")
            else:
                problems.extend(_role_problems(name, parameter, bound[name], tasks))
        if problems:
            raise RecipeError(problems)
        return bound

    def facts(self) -> dict[str, Any]:
        """Return the row as JSON, without what only its code knows: the parameters."""
        return {
            "summary": self.doc.partition("\n")[0],
            "formula": self.formula,
            "use": self.use,
            "paper": self.paper,
            "cost": self.cost,
            "scope": "module",  # reserved: every method sees one module at a time
            "evidence": self.needs,
            "tensors": dict(self.takes),
            "default_rank": self.default_rank,
            "family": self.family,
            "is_dense": self.is_dense,
            "exempt": dict(self.exempt),
        }

    def schema(self) -> dict[str, Any]:
        """Return the row as JSON: parameters with type, range, default and meaning, too."""
        own = self.parameters()
        presets = typing.get_args(_plain(own["preset"])) if "preset" in own else ()
        return {
            **self.facts(),
            "parameters": _described(own),
            "steps": _described(STEPS),
            "presets": {name: {"preset": name} for name in presets},
        }


def _described(parameters: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    return {
        name: {**_adapter(one.annotation).json_schema(), "default": one.default}
        for name, one in parameters.items()
    }


def _adapter(annotation: Any) -> TypeAdapter:
    return TypeAdapter(annotation, config=ConfigDict(strict=True, allow_inf_nan=False))


def _plain(parameter: inspect.Parameter) -> Any:
    return getattr(parameter.annotation, "__origin__", parameter.annotation)


def _weights_by_task(value: Any, tasks: Sequence[str]) -> Any:
    """Turn a list in the user's adapter order into a mapping; a mapping must name every task."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != len(tasks):
            raise ValueError(f"{len(value)} numbers but {len(tasks)} adapters. Give one for each.")
        return dict(zip(tasks, value, strict=True))
    if isinstance(value, Mapping) and set(value) != set(tasks):
        wrong = ", ".join(sorted(set(value) ^ set(tasks)))
        raise ValueError(f"names differ from the adapters' ({wrong}). Name each adapter once.")
    return value


def is_role(parameter: inspect.Parameter) -> bool:
    """Say whether a parameter names an adapter."""
    metadata = getattr(parameter.annotation, "__metadata__", ())
    return any(
        isinstance(extra := getattr(item, "json_schema_extra", None), dict)
        and extra.get("role") == "adapter"
        for item in metadata
    )


def _role_problems(
    name: str, parameter: inspect.Parameter, value: Any, tasks: Sequence[str]
) -> list[str]:
    if not is_role(parameter) or value in tasks:
        return []
    return [
        f"params.{name}: {value!r} names no adapter but must be one of {', '.join(tasks)}."
        f"{did_you_mean(str(value), tasks)}"
    ]


def frozen(table: dict[str, Method]) -> Mapping[str, Method]:
    """Return the table read-only, checked for rows filed under another name."""
    assert all(name == row.name for name, row in table.items())
    return types.MappingProxyType(table)
