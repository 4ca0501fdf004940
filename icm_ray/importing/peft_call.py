"""PEFT's `add_weighted_adapter(...)`, read from a program's syntax tree; the program never runs."""

import ast
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from icm_ray.errors import RecipeError, did_you_mean
from icm_ray.importing.counterparts import COMBINATIONS
from icm_ray.importing.literals import NotLiteral, constants_of, number, value_of
from icm_ray.importing.model_entries import Findings
from icm_ray.importing.writing import FILL_IN, Imported, adapter_names, to_download

CALL = "add_weighted_adapter"
ARGUMENTS = (
    *("adapters", "weights", "adapter_name", "combination_type", "svd_rank", "svd_clamp"),
    *("svd_full_matrices", "svd_driver", "density", "majority_sign_method"),
)
"""Of PEFT 0.21, in order."""
UNKNOWN = object()
"""Value of an argument that the file computes; that is told once, and nothing else about it."""
NO_BASE = (
    "PEFT needs the base model with every adapter loaded into it. Here the adapters are merged "
    "themselves, from their files, and modules are read when their turn comes."
)
RSLORA = (
    "PEFT 0.21 lets the result inherit use_rslora, so that merged rsLoRA adapters are sqrt(rank) "
    "times too large there. Here every adapter's scaling is folded in once."
)


def read_peft_call(source: Path, text: str) -> Imported:
    """Read a Python file with one merge call; see `importing.import_recipe`."""
    tree = _parse(source, text)
    findings = Findings()
    calls = [node for node in _calls(tree) if _called(node) == CALL]
    if len(calls) != 1:
        lines = ", ".join(str(call.lineno) for call in calls)
        notes = f"{len(calls)} calls (lines {lines})" if calls else "no call"
        raise RecipeError(f"{source}: {notes} of {CALL} but one is expected.")
    constants = constants_of(tree)
    arguments = _arguments(calls[0], constants, findings)
    names, weights = _adapters(arguments, findings)
    kind, params, rank = _combination(arguments, len(names), findings)
    paths = _paths(tree, constants, findings)
    if findings.problems:
        where = f"{source}: line {calls[0].lineno}"
        raise RecipeError([f"{where}: {problem}" for problem in findings.problems])
    ours = dict(zip(names, adapter_names(names), strict=True))
    adapters = {ours[name]: paths.get(name, f"{FILL_IN}{ours[name]}") for name in names}
    merged = arguments.get("adapter_name", source.stem)
    notes = [NO_BASE, RSLORA, *COMBINATIONS[kind].differences]
    if COMBINATIONS[kind].method == "svd":
        notes.append("The cut to output.rank is the largest input rank unless given, as with PEFT.")
    return Imported(
        source=source,
        tool=f"PEFT's {CALL}(combination_type={kind!r})",
        adapters=adapters,
        method=COMBINATIONS[kind].method,
        params={**params, "weights": dict(zip(adapters, weights, strict=True))},
        output=f"merged/{adapter_names([merged if isinstance(merged, str) else source.stem])[0]}",
        rank=rank,
        differences=tuple(notes),
        warnings=(*findings.warnings, *_renamed(ours), *to_download(adapters)),
    )


def _parse(source: Path, text: str) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the file's own strings
            return ast.parse(textwrap.dedent(text))
    except SyntaxError as error:
        raise RecipeError(
            f"{source}: line {error.lineno}: not plain Python. Keep the lines that load the "
            "adapters and merge them."
        ) from None
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes, endless nesting
        raise RecipeError(f"{source}: not plain Python ({type(error).__name__}).") from None


def _calls(tree: ast.AST) -> list[ast.Call]:
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return sorted(found, key=lambda call: (call.lineno, call.col_offset))


def _called(call: ast.Call) -> str:
    function = call.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _owner(call: ast.Call) -> str:
    """Return the name of what a method is called on: PeftModel of peft.PeftModel.f()."""
    owner = call.func.value if isinstance(call.func, ast.Attribute) else None
    if isinstance(owner, ast.Attribute):
        return owner.attr
    return owner.id if isinstance(owner, ast.Name) else ""


def _arguments(
    call: ast.Call, constants: Mapping[str, ast.expr], findings: Findings
) -> dict[str, Any]:
    """Return the arguments of the merge call by name; one that is not literal is a problem."""
    nodes: dict[str, ast.expr] = dict(zip(ARGUMENTS, call.args, strict=False))
    if len(call.args) > len(ARGUMENTS):
        findings.problems.append(f"{len(call.args)} arguments but {CALL} takes {len(ARGUMENTS)}.")
    for keyword in call.keywords:
        if keyword.arg in ARGUMENTS:
            nodes[keyword.arg] = keyword.value
        elif keyword.arg:
            near = did_you_mean(keyword.arg, ARGUMENTS)
            findings.problems.append(f"{keyword.arg}: {CALL} has no such argument.{near}")
        else:
            findings.problems.append("**: what it holds is not known. Write the arguments out.")
    arguments: dict[str, Any] = {}
    for name, node in nodes.items():
        try:
            arguments[name] = value_of(node, constants)
        except (NotLiteral, RecursionError):
            arguments[name] = UNKNOWN
            if name not in ("adapter_name", "svd_full_matrices", "svd_driver"):
                findings.problems.append(f"{name}: its value is computed. Write the value itself.")
    return arguments


def _adapters(given: Mapping[str, Any], findings: Findings) -> tuple[list[str], list[float]]:
    names, weights = given.get("adapters"), given.get("weights")
    is_named = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    if not names or not is_named:
        if names is not UNKNOWN:
            findings.problems.append("adapters: a list of adapter names is expected.")
        names = []
    if len(set(names)) < len(names):
        findings.problems.append("adapters: one is named twice. Keep one, with the added weights.")
    try:
        numbers = [number(weight) for weight in weights] if isinstance(weights, list) else []
    except NotLiteral:
        numbers = []
    if not numbers:
        if weights is not UNKNOWN:
            findings.problems.append("weights: a list of numbers is expected.")
    elif names and len(numbers) != len(names):
        findings.problems.append(
            f"weights: {len(numbers)} numbers but {len(names)} adapters. PEFT would leave out what "
            "is over without a word. Give one for each."
        )
    return names, numbers


def _combination(
    given: Mapping[str, Any], count: int, findings: Findings
) -> tuple[str, dict[str, Any], int | None]:
    """Return PEFT's combination type, our parameters besides weights, and the output rank."""
    kind = given.get("combination_type", "svd")
    if not isinstance(kind, str) or kind not in COMBINATIONS:
        if kind is not UNKNOWN:
            near = did_you_mean(str(kind), COMBINATIONS)
            findings.problems.append(
                f"combination_type: PEFT 0.21 has {', '.join(COMBINATIONS)}.{near}"
            )
        return "svd", {}, None
    if count == 1 and kind != "linear":
        findings.warnings.append(f"combination_type: {kind}: PEFT takes linear for one adapter.")
        kind = "linear"
    ours = COMBINATIONS[kind]
    params: dict[str, Any] = {"preset": ours.preset} if ours.preset else {}
    if "density" in ours.reads:
        params["density"] = _density(given.get("density"), findings)
    elif given.get("density") is not None:
        findings.warnings.append(f"density: left out, as {kind} reads none.")
    elects = "ties" in kind
    if elects and given.get("majority_sign_method", "total") not in ("total", UNKNOWN):
        findings.problems.append("majority_sign_method: only total has a counterpart.")
    return kind, params, _rank(kind, given, findings)


def _density(value: Any, findings: Findings) -> float:
    try:
        density = number(value)
    except NotLiteral:
        if value is not UNKNOWN:
            findings.problems.append("density: a number is expected. PEFT stops without one too.")
        return 1.0
    if density > 1:
        findings.warnings.append("density: above 1 means 1, as it does for PEFT.")
    return min(density, 1.0)


def _rank(kind: str, given: Mapping[str, Any], findings: Findings) -> int | None:
    """Return svd_rank where it counts, and judge the other arguments of the decomposition."""
    rank = given.get("svd_rank")
    if not kind.endswith("svd"):
        findings.warnings.extend(
            f"{name}: left out, as {kind} decomposes nothing."
            for name in ("svd_rank", "svd_clamp")
            if given.get(name) is not None
        )
        return None
    if given.get("svd_clamp") not in (None, UNKNOWN):
        findings.problems.append("svd_clamp: there is no counterpart. Leave it out.")
    findings.warnings.extend(
        f"{name}: left out, as it changes only how PEFT computes."
        for name in ("svd_full_matrices", "svd_driver")
        if name in given
    )
    if rank is None or rank is UNKNOWN:
        return None
    if type(rank) is not int or rank < 0:
        findings.problems.append("svd_rank: a positive whole number is expected.")
        return None
    return rank or None  # PEFT takes 0 for the largest input rank too


def _paths(tree: ast.AST, constants: Mapping[str, ast.expr], findings: Findings) -> dict[str, str]:
    """Return the path of every adapter that the file loads by name."""
    found: dict[str, str] = {}
    for call in _calls(tree):
        loaded = _loaded(call, constants)
        if not loaded:
            continue
        name, path = loaded
        if found.setdefault(name, path) != path:
            findings.problems.append(f"adapters: {name!r} is loaded twice, from different paths.")
    return found


def _loaded(call: ast.Call, constants: Mapping[str, ast.expr]) -> tuple[str, str] | None:
    """Return name and path if `call` loads an adapter and says both."""
    if _called(call) == "load_adapter":
        places = {"model_id": 0, "adapter_name": 1}
    elif _called(call) == "from_pretrained" and "PeftModel" in _owner(call):
        places = {"model_id": 1, "adapter_name": 2}
    else:
        return None
    nodes = {key.arg: key.value for key in call.keywords if key.arg}
    nodes |= {n: call.args[place] for n, place in places.items() if place < len(call.args)}
    path = nodes.get("model_id", nodes.get("peft_model_id"))
    default = ast.Constant("default")  # PEFT's name for the first adapter
    texts = []
    for node in (nodes.get("adapter_name", default), path, nodes.get("subfolder")):
        try:
            texts.append(value_of(node, constants) if node else None)
        except (NotLiteral, RecursionError):
            texts.append(None)
    name, path, folder = texts
    if not isinstance(name, str) or not isinstance(path, str) or not path:
        return None
    return name, f"{path}/{folder}" if isinstance(folder, str) and folder else path


def _renamed(ours: Mapping[str, str]) -> Iterator[str]:
    for theirs, name in ours.items():
        if theirs != name:
            yield f"adapters: {theirs!r} is called {name!r} here."
