"""The models of a mergekit file: which adapters it merges, and where each one's settings stand."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Settings = Mapping[str, Any]


@dataclass
class Findings:
    """What is found wrong with a file, and what is left out of it; both grow while it is read."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Entry:
    """One model of the file.

    Attributes:
        where: Its place, such as "models[1]".
        base: Full model, with "@revision" if it has one.
        adapter: The adapter after the "+", likewise; None for a full model alone.
        settings: Tables of parameters, the most specific first.
        layers: How many layers the model has; None where the file does not say.
    """

    where: str
    base: str
    adapter: str | None
    settings: tuple[Settings, ...]
    layers: int | None = None


def read_entries(values: Settings, findings: Findings) -> list[Entry]:
    """Return the models of a file in its order; what cannot be carried over goes to `findings`."""
    parts = [key for key in ("models", "slices", "modules") if values.get(key) is not None]
    if len(parts) != 1:
        findings.problems.append(
            f"{' and '.join(parts) or 'models'}: give either models or slices, and one of them."
        )
        return []
    if parts == ["modules"]:
        findings.problems.append(
            "modules: parts of a model are merged apart, but an adapter is merged whole. "
            "Write the adapters as models."
        )
        return []
    shared = (as_table(values.get("parameters"), "parameters", findings),)
    if parts == ["models"]:
        items = _tables(values["models"], "models", {"model", "parameters"}, findings)
        return list(_entries(items, shared, findings))
    return list(_sliced(values["slices"], shared, findings))


def as_table(value: Any, where: str, findings: Findings) -> Settings:
    """Return `value` if it is a table, and an empty one otherwise, with a problem unless None."""
    if value is None:
        return {}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return value
    findings.problems.append(f"{where}: {type(value).__name__} but a table is expected.")
    return {}


def reference(value: Any, where: str, findings: Findings) -> tuple[str, str | None] | None:
    """Return full model and adapter of "base+adapter", or of mergekit's table form of it."""
    if isinstance(value, str) and value and value.count("+") <= 1:
        base, _, adapter = value.partition("+")
        if base:
            return base, adapter or None
    if isinstance(value, dict) and set(value) <= {"model", "lora"}:
        base, adapter = _path(value.get("model")), _path(value.get("lora"))
        if base and (adapter or value.get("lora") is None):
            return base, adapter
    findings.problems.append(f"{where}: not of the form base+adapter. Write it so.")
    return None


def _path(value: Any) -> str | None:
    if isinstance(value, dict) and set(value) <= {"path", "revision"}:
        path, revision = value.get("path"), value.get("revision")
        if isinstance(path, str) and isinstance(revision, str | None):
            return f"{path}@{revision}" if revision else path
    return value if isinstance(value, str) else None


def _tables(
    value: Any, where: str, known: set[str], findings: Findings
) -> Iterator[tuple[str, Settings]]:
    if not isinstance(value, list) or not value:
        findings.problems.append(f"{where}: a list with at least one entry is expected.")
        return
    for index, item in enumerate(value):
        place = f"{where}[{index}]"
        table = as_table(item, place, findings)
        for key in sorted(set(table) - known):
            findings.problems.append(f"{place}.{key}: cannot be carried over. Leave it out.")
        yield place, table


def _entries(
    items: Iterator[tuple[str, Settings]],
    shared: tuple[Settings, ...],
    findings: Findings,
    layers: int | None = None,
) -> Iterator[Entry]:
    for where, table in items:
        found = reference(table.get("model"), f"{where}.model", findings)
        own = as_table(table.get("parameters"), f"{where}.parameters", findings)
        if found:
            yield Entry(where, *found, (own, *shared), layers)


def _sliced(value: Any, shared: tuple[Settings, ...], findings: Findings) -> Iterator[Entry]:
    """Yield the models of a single slice that covers them from their first layer on."""
    slices = list(_tables(value, "slices", {"sources", "parameters"}, findings))
    if len(slices) > 1:
        findings.problems.append(
            f"slices: {len(slices)} pieces but one that covers the whole model is expected. "
            "An adapter is merged whole."
        )
    for where, table in slices[:1]:
        known = {"model", "layer_range", "parameters"}
        sources = list(_tables(table.get("sources"), f"{where}.sources", known, findings))
        layers = _layers(where, [source.get("layer_range") for _, source in sources], findings)
        own = as_table(table.get("parameters"), f"{where}.parameters", findings)
        yield from _entries(iter(sources), (own, *shared), findings, layers)


def _layers(where: str, ranges: list[Any], findings: Findings) -> int | None:
    """Return how many layers a slice has, the same of every model and from the first one on."""
    match ranges:
        case [[0, int(end)], *rest] if all(one == ranges[0] for one in rest):
            findings.warnings.append(
                f"{where}: layers 0 to {end - 1} are taken for the whole model; every module of "
                "the adapters is merged."
            )
            return end
        case [_, *_]:
            findings.problems.append(
                f"{where}: layer_range: the same layers of every model, from 0 on, are expected. "
                "An adapter is merged whole."
            )
    return None
