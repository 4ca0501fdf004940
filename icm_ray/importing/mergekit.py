"""mergekit's YAML, as far as it merges `base+adapter` models whole."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from icm_ray.config.loading import read_yaml
from icm_ray.errors import RecipeError
from icm_ray.importing.counterparts import COUNTERPARTS, DEFAULTS, TIMES, Counterpart, nearest
from icm_ray.importing.model_entries import Entry, Findings, Settings, read_entries, reference
from icm_ray.importing.writing import Imported, adapter_names, to_download

NO_BASE = (
    "mergekit loads the base once per adapter, merges each into it and writes a whole model. Here "
    "the adapters are merged themselves: the base is never loaded and the result is an adapter."
)
SIMPLE = {"models", "slices", "modules", "parameters", "merge_method", "base_model"}
DTYPES = ("float32", "bfloat16", "float16")

Tables = tuple[Settings, ...]
"""Tables of parameters, the most specific first."""


def read_mergekit(source: Path) -> Imported:
    """Read a mergekit file; see `importing.import_recipe`."""
    values = read_yaml(source)
    findings = Findings()
    method = values.get("merge_method")
    counterpart = COUNTERPARTS.get(method) if isinstance(method, str) else None
    if not isinstance(method, str):
        findings.problems.append("merge_method: the name of a method is expected.")
    elif counterpart is None:
        findings.problems.append(
            f"merge_method: {method!r} has no counterpart here.{nearest(method)}"
        )
    entries = read_entries(values, findings)
    base = _common_base(entries, values.get("base_model"), findings)
    dtype = _other_keys(values, findings)
    merged = [entry for entry in entries if entry.adapter]
    adapters = _adapters(merged, findings)
    params: dict[str, Any] = {}
    notes: list[str] = []
    if counterpart and adapters:
        params, notes = _params(counterpart, entries, list(adapters), findings)
    if findings.problems:
        raise RecipeError([f"{source}: {problem}" for problem in dict.fromkeys(findings.problems)])
    assert counterpart
    return Imported(
        source=source,
        tool=f"a mergekit file (merge_method: {method})",
        adapters=adapters,
        method=counterpart.method,
        params=params,
        output=f"merged/{adapter_names([source.stem])[0]}",
        dtype=dtype,
        base=base,
        differences=(NO_BASE, *notes, *counterpart.differences),
        warnings=(*findings.warnings, *to_download(adapters)),
    )


def _other_keys(values: Settings, findings: Findings) -> str | None:
    """Judge the keys that are about neither models nor method; return the result's dtype."""
    for key in sorted(set(values) - SIMPLE - {"dtype", "out_dtype", "tokenizer_source"}):
        why = "an adapter has no tokenizer" if key in ("tokenizer", "chat_template") else "unknown"
        findings.problems.append(f"{key}: cannot be carried over ({why}). Leave it out.")
    if values.get("tokenizer_source") == "base":
        findings.warnings.append("tokenizer_source: base: left out, as the base keeps its own.")
    elif values.get("tokenizer_source") is not None:
        findings.problems.append(
            "tokenizer_source: a merged adapter leaves the base's tokenizer as it is. "
            "Leave it out, or write base."
        )
    dtype = values.get("out_dtype") or values.get("dtype")
    if dtype is None:
        return None
    short = str(dtype).removeprefix("torch.")
    if short not in DTYPES:
        findings.problems.append(f"dtype: one of {', '.join(DTYPES)} is expected.")
        return None
    findings.warnings.append(
        f"dtype: {short} is the dtype of the result; the arithmetic is done in float32."
    )
    return short


def _common_base(entries: Sequence[Entry], named: Any, findings: Findings) -> str | None:
    """Return the one base that every entry stands on; more than one is a problem."""
    bases = list(dict.fromkeys(entry.base for entry in entries if entry.adapter))
    if named is not None and (found := reference(named, "base_model", findings)):
        if found[1]:
            findings.problems.append(
                "base_model: is a base with an adapter, but changes are counted from a plain base."
            )
        elif found[0] not in bases:
            bases.append(found[0])
    if len(bases) > 1:
        findings.problems.append(
            f"models: {len(bases)} different bases, but adapters of one base can be merged."
        )
    for entry in entries:
        if entry.adapter is None and bases and entry.base != bases[0]:
            findings.problems.append(
                f"{entry.where}: a full model, but adapters are merged here. Write base+adapter, "
                "or extract an adapter from it first."
            )
    return bases[0] if bases else None


def _adapters(merged: Sequence[Entry], findings: Findings) -> dict[str, str]:
    if not merged and not findings.problems:
        findings.problems.append("models: no adapter among them. Write base+adapter.")
    parts = [str(entry.adapter).partition("@") for entry in merged]
    paths = [path for path, _, _ in parts]
    times = Counter(paths)
    for entry, (path, _, revision) in zip(merged, parts, strict=True):
        if times[path] > 1:
            findings.problems.append(f"{entry.where}: its adapter is named twice. Keep one.")
        if revision:
            findings.warnings.append(
                f"{entry.where}: revision {revision} of {path} is left out. Download that one."
            )
    return dict(zip(adapter_names(paths), paths, strict=True))


def _params(
    counterpart: Counterpart, entries: Sequence[Entry], names: Sequence[str], findings: Findings
) -> tuple[dict[str, Any], list[str]]:
    """Return our parameters for mergekit's, and what to say about them."""
    merged = [entry for entry in entries if entry.adapter]
    shared = entries[0].settings[1:]
    params: dict[str, Any] = {n: _one_for_all(n, merged, findings) for n in counterpart.reads}
    if _leaves_range(params):
        findings.problems.append("epsilon: mergekit wants density +- epsilon inside 0 and 1.")
    notes = []
    if counterpart.weighted:
        weighed = entries if counterpart.method == "soup" else merged
        by_layer, notes = _weights_by_layer(counterpart, weighed, shared, findings)
        of_entry = zip(weighed, zip(*by_layer, strict=True), strict=True)
        kept = [list(w) if len(set(w)) > 1 else w[0] for entry, w in of_entry if entry.adapter]
        params["weights"] = dict(zip(names, kept, strict=True))
    if counterpart.elects:
        normalized = _flag(shared, "normalize", counterpart.normalizes, findings)
        params["aggregate"] = "mean" if normalized else "sum"
    if counterpart.scaled:
        params["scale"] = _number(shared, "lambda", "parameters", findings, default=1.0)
        notes.append("`scale` is mergekit's `lambda`.")
    if _flag(shared, "rescale", counterpart.rescales, findings) != counterpart.rescales:
        notes += _without_rescaling(counterpart, params, findings)
    if _flag(shared, "filter_wise", False, findings):
        findings.problems.append("parameters.filter_wise: there is no counterpart. Leave it out.")
    if counterpart.preset:
        params["preset"] = counterpart.preset
    params |= {name: factor * params[name] for name, factor in TIMES.items() if name in params}
    _mention_unread(counterpart, entries, findings)
    return params, notes


def _leaves_range(params: dict[str, Any]) -> bool:
    if "epsilon" not in params or params["density"] == 1:  # where nothing is dropped
        return False
    return not params["epsilon"] < params["density"] < 1 - params["epsilon"]


def _weights_by_layer(
    counterpart: Counterpart, entries: Sequence[Entry], shared: Tables, findings: Findings
) -> tuple[list[list[float]], list[str]]:
    """Return every entry's weight as our method takes it, layer by layer, and what to say."""
    given = [_gradient(entry, findings) for entry in entries]
    layers = max(map(len, given), default=1)
    columns = zip(*(one if len(one) == layers else one * layers for one in given), strict=True)
    found = [_weights(counterpart, list(column), shared, findings) for column in columns]
    notes = list(dict.fromkeys(note for _, told in found for note in told))
    return [weights for weights, _ in found], notes


def _gradient(entry: Entry, findings: Findings) -> list[float]:
    """Return an entry's weight in every layer, or one for all.

    mergekit reads a list as points at equal distances from the first layer to the last, with
    straight lines between them.
    """
    value = next((t["weight"] for t in entry.settings if t.get("weight") is not None), None)
    points = list(_numbers(value)) if _is_gradient(value) else []
    if len(set(points)) < 2 or not all(map(math.isfinite, points)):
        return [_number(entry.settings, "weight", entry.where, findings)]
    if entry.layers is None:
        findings.problems.append(
            f"{entry.where}: weight: a list over the layers, but the file does not say how many "
            "there are. Write slices with one layer_range that covers the model."
        )
        return [1.0]
    last, places = len(points) - 1, max(entry.layers - 1, 1)
    whole = [divmod(layer * last, places) for layer in range(entry.layers)]
    return [points[i] + (points[min(i + 1, last)] - points[i]) * rest / places for i, rest in whole]


def _is_gradient(value: Any) -> bool:
    return isinstance(value, list) and not any(isinstance(item, dict) for item in value)


def _weights(
    counterpart: Counterpart, weights: list[float], shared: Tables, findings: Findings
) -> tuple[list[float], list[str]]:
    """Return every entry's weight in one layer as our method takes it."""
    total = sum(weights)
    normalized = _flag(shared, "normalize", counterpart.normalizes, findings)
    if counterpart.elects:
        return _votes(counterpart, weights, normalized, findings)
    if counterpart.method == "soup" and not normalized and abs(total - 1) > 1e-6:
        findings.problems.append(
            f"parameters.normalize: false with weights that add up to {total:g} scales the base as "
            "well, which no adapter can do. Let the weights add up to 1."
        )
    if not normalized or abs(total) < 1e-8:
        return weights, ["Weights are taken as they are (normalize: false)."]
    return [weight / total for weight in weights], [
        "Weights are divided by their sum already (normalize: true)."
    ]


def _votes(
    counterpart: Counterpart, weights: list[float], normalized: bool, findings: Findings
) -> tuple[list[float], list[str]]:
    notes = "Weights multiply the changes before signs are elected; "
    if not normalized:
        return weights, [notes + "of those that agree the sum is taken (normalize: false)."]
    if counterpart.elects == "by number":
        if len(set(weights)) > 1:
            findings.problems.append(
                "parameters.normalize: true with unequal weights has no counterpart. Let weights "
                "be equal, or write normalize: false."
            )
        # Equal weights divide out, and what is left is the mean of those that agree.
        return [1.0] * len(weights), ["Equal weights divide out (normalize: true)."]
    return weights, [notes + "of those that agree the weighted mean is taken (normalize: true)."]


def _without_rescaling(
    counterpart: Counterpart, params: dict[str, Any], findings: Findings
) -> list[str]:
    if not counterpart.rescales:
        findings.problems.append("parameters.rescale: there is no counterpart. Leave it out.")
        return []
    # The usual result is 1 / density times what is left; so density times that is what is left.
    params["scale"] *= params["density"]
    return ["`scale` holds the density as well, which takes the rescaling back (rescale: false)."]


def _one_for_all(name: str, entries: Sequence[Entry], findings: Findings) -> float:
    values = [_number(e.settings, name, e.where, findings, default=DEFAULTS[name]) for e in entries]
    if len(set(values)) > 1:
        findings.problems.append(
            f"{name}: {', '.join(f'{value:g}' for value in values)} but one number for all models "
            "is expected."
        )
    if name == "density" and values[0] > 1:
        findings.warnings.append("density: above 1 means 1, as it does for mergekit.")
        return 1.0
    return values[0]


def _mention_unread(counterpart: Counterpart, entries: Sequence[Entry], findings: Findings) -> None:
    """Say which settings are left out because they change nothing."""
    given = {name for entry in entries for table in entry.settings for name in table}
    read = {"normalize", "rescale", "filter_wise", *counterpart.reads}
    read |= {"weight"} if counterpart.weighted else set()
    read |= {"lambda"} if counterpart.scaled else set()
    for name in sorted(given - read):
        why = "it only saves memory there" if name == "int8_mask" else "the method reads none"
        findings.warnings.append(f"parameters.{name}: left out, as {why}.")


def _number(
    settings: Tables, name: str, where: str, findings: Findings, *, default: float | None = None
) -> float:
    """Return a setting that is one number for every tensor; anything else is a problem."""
    value = next((table[name] for table in settings if table.get(name) is not None), default)
    numbers = list(_numbers(value))
    if value is None:
        findings.problems.append(f"{where}: no {name}. mergekit asks for one.")
    elif not numbers or not all(map(math.isfinite, numbers)):
        findings.problems.append(f"{where}: {name}: a number is expected.")
    elif len(set(numbers)) > 1:
        findings.problems.append(
            f"{where}: {name}: differs between layers or tensors, but one number for the whole "
            "adapter is expected. Keep one."
        )
    else:
        return numbers[0]
    return 1.0


def _numbers(value: Any) -> Iterator[float]:
    """Yield every number a setting may take: scalars, gradients over layers, filtered values."""
    if isinstance(value, int | float):
        yield float(value)
    elif isinstance(value, dict) and set(value) <= {"filter", "value"}:
        yield from _numbers(value.get("value"))
    elif isinstance(value, list):
        for item in value:
            yield from list(_numbers(item)) or [math.nan]
    else:
        yield math.nan


def _flag(settings: Tables, name: str, default: bool, findings: Findings) -> bool:
    return bool(_number(settings, name, "parameters", findings, default=float(default)))
