"""Every job's command line, and the results.json it leaves whatever happens."""

import errno
import json
import os
import runpy
import signal
import sys
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from command_samples import recipe_of, save_lora
from safetensors import SafetensorError

from icm_ray.command import run_job
from icm_ray.config import INSECURE_VARIABLE, MergeRecipe
from icm_ray.errors import ClusterError, InputError, RecipeError, ResourceError

ROOT = Path(__file__).resolve().parents[1]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("[a-z]*.py"))


@pytest.fixture
def job(monkeypatch, capsys):
    """Return a function that runs `python -m jobs.<name>` here; gives code, stdout, stderr."""
    monkeypatch.syspath_prepend(ROOT)

    def run(name, *words):
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*found in sys.modules.*")
            with pytest.raises(SystemExit) as left:
                runpy.run_module(f"jobs.{name}", run_name="__main__")
        return left.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def recipe(tmp_path):
    return recipe_of(tmp_path / "recipe.yaml", {"a": save_lora(tmp_path / "a")})


def results(recipe):
    beside = recipe.with_name("merged.results.json")
    return json.loads(beside.read_text())


def test_there_are_jobs():
    assert set(JOBS) >= {"prepare", "finetune", "evidence", "merge", "evaluate", "pipeline"}


@pytest.mark.parametrize("name", JOBS)
def test_every_job_explains_itself(job, name):
    code, out, err = job(name, "--help")
    assert (code, err) == (0, "")
    assert f"python -m jobs.{name} -c configs/{name}/" in out
    assert "--config" in out


@pytest.mark.parametrize("name", JOBS)
def test_every_job_refuses_unknown_keys_in_one_line_each(job, name, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"no_such_key": 1, "nor_this": 2, "seed": "three"}))
    code, out, err = job(name, "-c", path)
    assert (code, out) == (2, "")
    lines = err.splitlines()
    assert all(line.startswith(f"error: {path}: ") for line in lines)
    for key in ("no_such_key", "nor_this", "seed"):
        assert sum(f": {key}: " in line for line in lines) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("name", JOBS)
def test_every_job_wants_a_recipe(job, name):
    code, _, err = job(name)
    assert code == 2
    assert "-c" in err


@pytest.mark.parametrize("name", JOBS)
def test_every_job_is_short(name):
    assert len((ROOT / "jobs" / f"{name}.py").read_text().splitlines()) <= 80


@pytest.mark.slow
def test_prepare_shows_base_and_data(job, tmp_path, tiny_bert):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"base": str(tiny_bert), "output": str(tmp_path / "out")}))
    code, out, _ = job("prepare", "-c", path)
    assert code == 0
    assert f"base {tiny_bert}" in out
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["outputs"]["base"] == str(tiny_bert)
    assert found["outputs"]["examples"]["year"]["test"] >= 1000


def test_merge_and_pipeline_refuse_before_ray_starts(job, recipe, tmp_path):
    import ray

    before = ray.is_initialized()
    code, _, err = job("merge", "-c", recipe, "method=soop")
    assert code == 2
    assert "Did you mean 'soup'?" in err
    table = [{"method": "soup"}, {"method": "soup"}, {"method": "svdd"}, {"label": "base"}]
    table[3] |= {"method": "task_arithmetic", "grid": {"scales": [0.1]}}
    plain = {"name": "x", "tasks": ["yaer"], "methods": table, "output": str(tmp_path / "out")}
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(plain))
    code, _, err = job("pipeline", "-c", path)
    assert code == 2
    told = err.splitlines()
    for words in ("'yaer' is no task", "'soup' names 2 rows", "'svdd' is not known"):
        assert any(words in line for line in told), words
    assert any("'base' is a reference" in line for line in told)
    assert any("methods.base: params.scales" in line for line in told)
    assert ray.is_initialized() == before
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RecipeError("r"), 2),
        (InputError(["one", "two"]), 3),
        (ResourceError("full"), 4),
        (MemoryError(), 4),
        (OSError(errno.ENOSPC, "No space left on device"), 4),
        (OSError(errno.EFBIG, "File too large", "/tmp/x"), 4),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), 4),
        (SafetensorError("Error while serializing: No space left (os error 28)"), 4),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory: 9 bytes"), 4),
        (torch.OutOfMemoryError("CUDA out of memory"), 4),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/nowhere/x"), 3),
        (PermissionError(errno.EACCES, "Permission denied", "/locked/x"), 3),
        (OSError(errno.EIO, "Input/output error"), 1),
        (ClusterError("lost"), 5),
        (KeyError("bug"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_every_failure_has_its_code_and_its_lines(recipe, capsys, error, code):
    def work(_recipe, _target):
        raise error

    assert run_job(MergeRecipe, work, "", ["-c", str(recipe)]) == code
    found = results(recipe)
    assert (found["status"], found["exit_code"]) == ("failed", code)
    assert found["problems"]
    err = capsys.readouterr().err
    assert err.splitlines() == [f"error: {problem}" for problem in found["problems"]]


def test_a_full_disk_is_told_with_its_path_and_what_is_free(recipe, capsys):
    def work(_recipe, _target):
        try:
            raise OSError(errno.ENOSPC, "No space left on device", str(recipe))
        except OSError as error:
            raise RuntimeError("task failed") from error

    assert run_job(MergeRecipe, work, "", ["-c", str(recipe)]) == 4
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {recipe}: No space left on device, ")
    assert "bytes are free" in line


def test_sigterm_ends_with_143_and_says_how_to_go_on(recipe, capsys):
    def work(_recipe, _target):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()

    before = signal.getsignal(signal.SIGTERM)
    assert run_job(MergeRecipe, work, "", ["-c", str(recipe)]) == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert results(recipe)["problems"] == ["terminated. Run the same command to resume."]
    assert "Run the same command to resume" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_is_found_behind_the_error_of_compiled_code(recipe, name, code):
    def work(_recipe, _target):
        try:
            os.kill(os.getpid(), getattr(signal, name))
            signal.pause()
        except BaseException as error:
            raise SystemError("returned a result with an exception set") from error

    assert run_job(MergeRecipe, work, "", ["-c", str(recipe)]) == code


def test_success_clears_away_an_earlier_failure(recipe):
    def work(_recipe, target):
        target.mkdir()
        return {"outputs": {"adapter": str(target)}}

    def fail(_recipe, _target):
        raise InputError("no")

    assert run_job(MergeRecipe, fail, "", ["-c", str(recipe)]) == 3
    assert run_job(MergeRecipe, work, "", ["-c", str(recipe)]) == 0
    assert not recipe.with_name("merged.results.json").exists()
    found = json.loads((recipe.with_name("merged") / "results.json").read_text())
    assert (found["status"], found["exit_code"], found["scores"]) == ("done", 0, {})


def test_a_submitted_job_refuses_an_output_that_would_vanish(recipe, monkeypatch, capsys):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.delenv("ICM_RAY_STORAGE", raising=False)
    monkeypatch.chdir(recipe.parent)
    words = ["-c", str(recipe), "output.path=runs/x"]
    assert run_job(MergeRecipe, lambda *_: {}, "", words) == 2
    assert "Set storage: or ICM_RAY_STORAGE" in capsys.readouterr().err
    assert not (recipe.parent / "runs").exists()
    seen = []

    def work(_recipe, target):
        seen.append(target)
        return {}

    storage = recipe.parent / "shared"
    assert run_job(MergeRecipe, work, "", [*words, f"storage={storage}"]) == 0
    monkeypatch.setenv("ICM_RAY_STORAGE", str(storage))
    assert run_job(MergeRecipe, work, "", words) == 0
    assert seen == [storage / "runs" / "x"] * 2


def test_the_flag_of_an_open_cluster_is_what_the_variable_is(recipe, monkeypatch):
    monkeypatch.delenv(INSECURE_VARIABLE, raising=False)
    seen = []

    def work(*_):
        seen.append(os.environ.get(INSECURE_VARIABLE))
        return {}

    assert run_job(MergeRecipe, work, "", ["-c", str(recipe)]) == 0
    monkeypatch.setenv(INSECURE_VARIABLE, "0")  # so that it is put back afterwards
    assert run_job(MergeRecipe, work, "", ["-c", str(recipe), "--insecure-cluster"]) == 0
    assert seen == [None, "1"]
