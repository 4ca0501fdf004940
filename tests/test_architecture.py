"""The walls of design.md section 3: who may import whom, and what stays out of a plain import."""

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "icm_ray"

# Each room and the rooms it may import. Leaves come first; a new arrow is a decision.
BASICS = {"errors", "kinds", "types", "files", "seeding", "checkpoint", "devices", "inputs"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "kinds": set(),
    "seeding": set(),
    "devices": {"errors"},
    "checkpoint": {"errors"},
    "inputs": set(),
    "linalg": set(),
    "types": {"errors", "kinds"},
    "owners": set(),
    "swap": {"owners"},
    "locks": {"errors", "owners", "swap"},
    "files": {"errors", "swap"},
    "config": {"errors", "files", "kinds"},
    "adapters": BASICS | {"linalg"},
    "fusion_vae": BASICS | {"config", "linalg"},
    "base_model": BASICS | {"adapters"},
    "evidence": BASICS | {"base_model", "fusion_vae", "linalg"},
    "methods": BASICS | {"evidence", "fusion_vae", "linalg"},
    "suites": BASICS | {"config"},
    "evaluation": BASICS | {"adapters", "base_model", "linalg", "suites"},
    "finetuning": BASICS | {"adapters", "base_model", "config", "evaluation", "suites"},
    "report": BASICS,
    "merging": BASICS | {"adapters", "config", "evidence", "linalg", "methods", "report", "suites"},
    "learning": BASICS
    | {"adapters", "base_model", "config", "evaluation", "evidence", "linalg", "merging"}
    | {"methods", "suites"},
    "fusion": BASICS
    | {"adapters", "base_model", "config", "evidence", "finetuning", "fusion_vae", "learning"}
    | {"linalg"},
    "search": BASICS
    | {"adapters", "base_model", "config", "evaluation", "evidence", "fusion", "fusion_vae"}
    | {"learning", "merging", "methods", "suites"},
    "importing": BASICS | {"adapters", "config", "methods", "suites"},
    "exporting": BASICS | {"adapters", "linalg", "merging"},
    "storage": {"config", "errors", "files", "locks", "suites"},
    "interruption": set(),
    "backend_lines": set(),
    "command": {"config", "errors", "files", "interruption", "locks", "storage", "suites"},
    "distributed": BASICS
    | {"adapters", "backend_lines", "base_model", "config", "evaluation", "evidence"}
    | {"finetuning", "fusion", "fusion_vae", "learning", "linalg", "merging", "search", "suites"},
    "workflows": BASICS
    | {"adapters", "base_model", "config", "distributed", "evaluation", "evidence", "finetuning"}
    | {
        "fusion",
        "learning",
        "linalg",
        "merging",
        "methods",
        "report",
        "search",
        "storage",
        "suites",
    },
    "benchmarks": BASICS
    | {"adapters", "base_model", "config", "distributed", "fusion", "fusion_vae", "learning"}
    | {"linalg", "merging", "methods"},
    "cli": BASICS
    | {"adapters", "command", "config", "exporting", "importing", "jobs", "locks", "merging"}
    | {"methods"}
    | {"report", "suites"},
    "__init__": {"adapters", "errors", "interruption", "merging", "methods", "types"},
    "__main__": {"cli"},
    "jobs": {"command", "config", "interruption"},
}
# Methods see evidence as named tensors alone; how it is gathered is none of their business.
METHODS_SEE = {"icm_ray.evidence.tensors", "icm_ray.evidence.rebuild"}
KEPT_OUT = (
    "torch",
    "ray",
    "transformers",
    "peft",
    "sklearn",
    "matplotlib",
    "accelerate",
    "deepspeed",
)
DOORS = (("exec", "icm_ray/suites/own_scorer.py"), ("exec", "icm_ray/methods/source.py"))
"""A scorer beside a suite, which a recipe allows by name; what signatures in our own files say."""
VAGUE = ("utils", "util", "common", "core", "base", "manager", "helpers", "misc", "runs")

FILES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "jobs").glob("*.py")])


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room_of(path: Path) -> str:
    if path.is_relative_to(PACKAGE):
        return path.relative_to(PACKAGE).with_suffix("").parts[0]
    return "jobs"


def imports(path: Path) -> Iterator[str]:
    """Yield every imported module, absolute, including `from x import y` as `x.y`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            assert node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_room_is_known() -> None:
    assert {room_of(path) for path in FILES} <= set(MAY_IMPORT)


def test_the_allowed_directions_have_no_circle() -> None:
    done: set[str] = set()
    while rest := {room for room in MAY_IMPORT if room not in done}:
        free = {room for room in rest if MAY_IMPORT[room] <= done}
        assert free, f"a circle among {sorted(rest)}"
        done |= free


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_point_the_right_way(path: Path) -> None:
    room = room_of(path)
    for module in imports(path):
        first, *rest = module.split(".")
        if first in ("icm_ray", "jobs"):
            other = rest[0] if rest and first == "icm_ray" else "__init__"
            assert first == "icm_ray", f"{name_of(path)} imports {module}"
            assert other in MAY_IMPORT[room] | {room}, f"{name_of(path)} imports {module}"
        if first == "ray":
            assert room == "distributed", f"{name_of(path)} imports {module}"


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if room_of(p) == "distributed" and p.name != "__init__.py"],
    ids=name_of,
)
def test_whatever_is_distributed_uses_ray(path: Path) -> None:
    assert any(module.split(".")[0] == "ray" for module in imports(path)), (
        f"{name_of(path)} never imports ray: another room is its own"
    )


def test_what_is_distributed_knows_no_recipe() -> None:
    for path in (path for path in FILES if room_of(path) == "distributed"):
        named = [m for m in imports(path) if m.startswith("icm_ray.config.")]
        assert not [m for m in named if m.endswith("Recipe")], name_of(path)


def test_methods_see_evidence_as_named_tensors_alone() -> None:
    for path in (path for path in FILES if room_of(path) == "methods"):
        for module in imports(path):
            if module.startswith("icm_ray.evidence"):
                assert module.rpartition(".")[0] in METHODS_SEE, f"{name_of(path)}: {module}"


@pytest.mark.parametrize("room", sorted({room_of(path) for path in FILES} - {"jobs"}))
def test_no_room_has_a_circle_inside(room: str) -> None:
    modules = {module_of(path): path for path in FILES if room_of(path) == room}
    arrows = {
        name: {target(module, modules) for module in imports(path)} - {None, name}
        for name, path in modules.items()
    }
    done: set[str] = set()
    while rest := arrows.keys() - done:
        free = {name for name in rest if arrows[name] <= done}
        assert free, f"a circle among {sorted(rest)}"
        done |= free


def module_of(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    return name.removesuffix(".__init__")


def target(imported: str, modules: Mapping[str, Path]) -> str | None:
    """Return which of some modules an import reaches: itself, or what a name is taken from."""
    return next((n for n in (imported, imported.rpartition(".")[0]) if n in modules), None)


def test_a_plain_import_stays_light() -> None:
    script = (
        "import sys, icm_ray\n"
        f"print(*sorted({{m.split('.')[0] for m in sys.modules}} & {set(KEPT_OUT)!r}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert run.stdout.split() == []


def test_jobs_are_short_and_name_their_recipe() -> None:
    jobs = [path for path in (ROOT / "jobs").glob("*.py") if path.name != "__init__.py"]
    assert len(jobs) >= 6
    for path in jobs:
        text = path.read_text()
        assert len(text.splitlines()) <= 80, name_of(path)
        assert f"python -m jobs.{path.stem} -c configs/{path.stem}/" in text, name_of(path)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_whatever_is_public_says_what_it_does(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) or not tree.body, name_of(path)
    for where in [tree, *(n for n in tree.body if isinstance(n, ast.ClassDef))]:
        for node in where.body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                told = ast.get_docstring(node) or node.name.startswith("_")
                assert told, f"{name_of(path)}:{node.lineno}: {node.name} has no docstring"


def test_no_room_has_a_vague_name() -> None:
    rooms = [path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()]
    assert not set(rooms) & set(VAGUE)


@pytest.mark.parametrize(
    "room", sorted(p.name for p in PACKAGE.iterdir() if (p / "__init__.py").is_file())
)
def test_each_room_has_a_folder_of_tests(room: str) -> None:
    assert list((ROOT / "tests" / room).glob("test_*.py")), f"tests/{room} is empty"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_code_comes_from_inputs(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if (called, name_of(path)) in DOORS:
                continue
            assert called not in ("eval", "exec", "yaml.load", "pickle.load", "pickle.loads"), (
                f"{name_of(path)}:{node.lineno}"
            )
            for keyword in node.keywords:
                if keyword.arg == "trust_remote_code":
                    assert ast.unparse(keyword.value) == "False", f"{name_of(path)}:{node.lineno}"
