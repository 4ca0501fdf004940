"""The package as a wheel installs it, away from any checkout."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command_samples import recipe_of, save_lora

from icm_ray.jobs import JOBS

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return a function that runs Python where only the built wheel is on the path."""
    root = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(root), str(ROOT)]
    subprocess.run(build, check=True, cwd=root)
    (wheel,) = root.glob("icm_ray-*.whl")
    site = root / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words):
        return subprocess.run(
            [sys.executable, "-m", *map(str, words)],
            capture_output=True,
            text=True,
            cwd=root,
            env={**kept, "PYTHONPATH": str(site)},
        )

    return run


@pytest.mark.slow
def test_a_wheel_merges_and_runs_jobs_without_a_checkout(installed, tmp_path, tiny_bert):
    two = {name: save_lora(tmp_path / name, seed) for seed, name in enumerate("ab")}
    words = [*two.values(), "--method", "ties", "params.density=0.5", "-o", tmp_path / "out"]
    merged = installed("icm_ray", "merge", *words)
    assert merged.returncode == 0, merged.stderr
    checked = installed("icm_ray", "verify", tmp_path / "out", "--base", tiny_bert)
    assert checked.returncode == 0, checked.stderr
    # The same merge as a job on Ray.
    recipe = recipe_of(tmp_path / "r.yaml", two, method="ties", params={"density": 0.5})
    done = installed("icm_ray", "run", "merge", "-c", recipe, f"output.path={tmp_path / 'ray'}")
    assert done.returncode == 0, done.stderr
    for file in ("adapter_model.safetensors", "merge_report.json", "README.md"):
        assert (tmp_path / "ray" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    assert "python -m jobs.merge" in installed("jobs.merge", "--help").stdout


@pytest.mark.slow
def test_a_wheel_brings_the_suites_data(installed, tmp_path, tiny_bert):
    recipe = tmp_path / "prepare.yaml"
    plain = {"suite": "text", "base": str(tiny_bert), "output": str(tmp_path / "prepared")}
    recipe.write_text(yaml.safe_dump(plain))
    done = installed("icm_ray", "run", "prepare", "-c", recipe)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "prepared" / "results.json").read_text())
    assert found["outputs"]["examples"]["year"]["test"] == 1024


def test_every_job_has_a_door():
    assert set(JOBS) == {path.stem for path in (ROOT / "jobs").glob("[a-z]*.py")}


def test_an_unknown_job_is_said_in_one_line(cli, tmp_path):
    code, out, err = cli("run", "pipelin", "-c", tmp_path / "r.yaml")
    assert (code, out) == (2, "")
    assert "Did you mean 'pipeline'?" in err


def test_a_merge_needs_no_recipe(cli, tmp_path):
    two = [save_lora(tmp_path / name, seed) for seed, name in enumerate(("a", "b"))]
    words = ["--method", "task_arithmetic", "-o", tmp_path / "out", "params.scale=0.25", "seed=3"]
    code, out, err = cli("merge", *two, *words)
    assert code == 0, err
    assert "2 adapters merged with task_arithmetic" in out
    recipe = recipe_of(
        tmp_path / "r.yaml",
        {"a": two[0], "b": two[1]},
        method="task_arithmetic",
        params={"scale": 0.25},
        seed=3,
        output={"path": str(tmp_path / "again")},
    )
    assert cli("merge", "-c", recipe)[0] == 0
    written = [tmp_path / name / "adapter_model.safetensors" for name in ("out", "again")]
    assert written[0].read_bytes() == written[1].read_bytes()


@pytest.mark.parametrize("words", [[], ["a", "--method", "soup"], ["a", "-c", "r.yaml"]])
def test_half_a_command_line_is_refused(cli, words):
    code, out, err = cli("merge", *words)
    assert (code, out) == (2, "")
    assert err.startswith("error: command line: ")
