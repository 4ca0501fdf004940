"""What commands import: nothing heavy where nothing is computed, PEFT where it is to read."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command_samples import recipe_of, save_lora

from icm_ray.cli import app
from icm_ray.jobs import JOBS

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "numba", "peft", "transformers", "ray", "pyarrow", "matplotlib")
HEAVY += ("datasets", "sacrebleu", "torchmetrics")
RUN_THEM = """
import json, runpy, sys
lines, heavy = json.loads(sys.argv[1])
found = []
for words in lines:
    sys.argv[:] = words
    try:
        runpy.run_module(words[0], run_name="__main__")
    except SystemExit as end:
        found.append([end.code or 0, [name for name in heavy if name in sys.modules]])
print(json.dumps(found))
"""
COMMANDS = [(c.name or c.callback.__name__).replace("_", "-") for c in app.registered_commands]


def run(*lines: list[str]) -> list[tuple[int, list[str]]]:
    """Run `python -m` lines in one new process.

    Returns:
        For each its exit code, and what of HEAVY it and those before it have imported.
    """
    words = [sys.executable, "-c", RUN_THEM, json.dumps([lines, HEAVY])]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    return [(code, imported) for code, imported in json.loads(done.stdout.splitlines()[-1])]


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    folders = {name: save_lora(tmp_path / name, seed) for seed, name in enumerate("ab")}
    output = str(tmp_path / "out")
    return str(recipe_of(tmp_path / "merge.yaml", folders, output=output, method="svd"))


def test_help_and_the_list_of_methods_need_no_library() -> None:
    lines = [["icm_ray", "methods", *more] for more in ([], ["ties"], ["--json"])]
    lines += [["icm_ray", "--help"]]
    lines += [["icm_ray", name, "--help"] for name in COMMANDS]
    lines += [[f"jobs.{name}", "--help"] for name in JOBS]
    assert run(*lines) == [(0, [])] * len(lines)


def test_what_is_wrong_with_a_line_or_a_recipe_is_told_without_a_library(recipe: str) -> None:
    lines = [
        ["icm_ray", "mrege"],
        ["icm_ray", "methods", "svdd"],
        ["icm_ray", "merge", "adapter"],
        ["icm_ray", "run", "nsk", "-c", recipe],
        ["icm_ray", "run", "pipeline", "-c", recipe],
        ["icm_ray", "merge", "-c", "nowhere.yaml"],
        ["icm_ray", "merge", "-c", recipe, "metod=svd"],
        ["icm_ray", "merge", "-c", recipe, "method=svdd"],
        ["icm_ray", "merge", "-c", recipe, "method=regmean"],
        ["icm_ray", "merge", "-c", recipe, "params.wieghts=[1, 2]"],
        ["icm_ray", "merge", "-c", recipe, "method=ties", "params.density=2.0"],
        ["icm_ray", "plan", "-c", recipe, "method=svdd"],
        ["icm_ray", "plan", "-c", recipe, "params.weights=[1]"],
        ["jobs.merge", "-c", recipe, "metod=svd"],
        ["jobs.merge", "-c", recipe, "params.wieghts=[1, 2]"],
        ["jobs.merge", "-c", recipe, "method=regmean"],
    ]
    assert run(*lines) == [(2, [])] * len(lines)


def test_a_merge_imports_what_computes_alone_and_peft_where_it_is_to_read(recipe: str) -> None:
    folder = Path(recipe).parent
    lines = [
        ["icm_ray", "plan", "-c", recipe],
        ["icm_ray", "inspect", str(folder / "a"), str(folder / "b")],
        ["icm_ray", "merge", "-c", recipe],
        ["icm_ray", "reproduce", str(folder / "out")],
        ["icm_ray", "verify", str(folder / "out")],
    ]
    *computed, (code, imported) = run(*lines)
    assert computed == [(0, ["torch", "numpy"])] * 4
    assert code == 0
    assert "peft" in imported
    assert "ray" not in imported
