"""Jobs as processes of their own, so that they can be killed, and small recipes of every job."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
from command_samples import save_lora
from ray_samples import ROOT, environment, finetune_recipe, write_yaml

PATIENCE = 500
"""Seconds until a job that must end has not."""
TASKS = ("keyword", "supersense")
SQUARE = {f"layers.{i}.{leaf}": (768, 768) for i in range(12) for leaf in "qv"}
FEW = {"workers": 2, "cpus_per_worker": 0.5}
DATA = {"suite": "text", "inputs_per_task": 96}
"""Of learners and evidence."""
KEPT = ("experts", "trajectories", "probes", "merged", "evidence", "scores", "adapter")
"""Folders of a pipeline whose bytes no kill may change; the report has clocks in it."""


def start(job: str, recipe: Path, **more: str) -> subprocess.Popen[bytes]:
    """Start a job in a session of its own; what it says goes to a file beside its recipe."""
    with recipe.with_suffix(".log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", f"jobs.{job}", "-c", str(recipe)],
            cwd=ROOT,
            env=environment(**more),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def said(recipe: Path) -> str:
    """Return what runs of a recipe have said so far."""
    return recipe.with_suffix(".log").read_text()


def finish(job: str, recipe: Path, code: int = 0, **more: str) -> float:
    """Run a job to its end, hold its exit code against `code`, and return how long it took."""
    started = time.monotonic()
    process = start(job, recipe, **more)
    assert process.wait(timeout=PATIENCE) == code, said(recipe)[-3000:]
    return time.monotonic() - started


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return a job's process and all below it."""
    own = psutil.Process(process.pid)
    return [own, *own.children(recursive=True)]


def gone(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Wait for processes to end; kill the rest, by their own ids, and return them."""
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    for process in alive:
        process.kill()
    return alive


def workers(process: subprocess.Popen[bytes], title: str) -> list[psutil.Process]:
    """Return a job's Ray workers whose title begins so, such as `ray::TaskActor`."""
    found = []
    for one in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error, IndexError):
            if one.cmdline()[0].startswith(title):
                found.append(one)
    return found


def until(found: Callable[[], Any], process: subprocess.Popen[bytes]) -> Any:
    """Wait until something is true of a running job, and return it."""
    deadline = time.monotonic() + PATIENCE
    while not (value := found()):
        assert process.poll() is None, "ended before it came to that"
        assert time.monotonic() < deadline, "it never came to that"
        time.sleep(0.05)
    return value


def kill(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Kill a job's driver without a warning; return what of it is alive half a minute later."""
    everyone = family(process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return gone(everyone[1:], 30)


def visible(out: Path) -> list[Path]:
    """Return what an onlooker takes for results: the first folder with files on each way down."""
    found = []
    for name in KEPT:
        for place, folders, files in os.walk(out / name):
            folders[:] = [] if files else [one for one in folders if not one.startswith(".")]
            found += [Path(place)] if files else []
    return found


def wide_adapters(root: Path, count: int = 4) -> dict[str, Path]:
    """Write adapters whose merge takes some seconds."""
    return {
        f"task{seed}": save_lora(root / f"task{seed}", seed, rank=8, shapes=SQUARE)
        for seed in range(count)
    }


def finetune_plain(base: Path, output: Path, **training: Any) -> dict[str, Any]:
    """Return a recipe of two experts as plain data."""
    made = finetune_recipe(base, output, tasks=list(TASKS))
    plain = json.loads(made.model_dump_json(exclude_defaults=True))
    plain["training"] |= training
    return plain


def recipe_of_job(
    job: str, output: Path, base: Path, experts: Path, wide: Mapping[str, Path]
) -> dict[str, Any]:
    """Return a recipe that keeps a job busy for some seconds.

    Args:
        job: Its name.
        output: Where its result goes.
        base: The tiny BERT.
        experts: Output of a finished `jobs.finetune` of TASKS.
        wide: Adapters for the merge.
    """
    own = experts / "experts" / "shared-seed0"
    refs = [{"name": task, "path": str(own / task / "adapter")} for task in TASKS]
    plain: dict[str, Any] = {"base": str(base), "resources": FEW, "output": str(output)}
    training = {"steps": 150, "save_every": 5}
    changes = {
        "merge": {
            "base": None,
            "adapters": [{"name": name, "path": str(path)} for name, path in wide.items()],
            "method": "ties",
            "output": {"path": str(output), "rank": 8},
        },
        "evidence": {"adapters": refs, "data": {**DATA, "inputs_per_task": 500}},
        "learn": {
            "adapters": refs,
            "data": DATA,
            "method": "task_vector_match",
            "learn": {
                "start": {"value": 0.3, "residual": None},
                "optimisation": {"steps": 60, "batch": 16, "save_every": 4},
            },
        },
        "train_fusion": {
            "adapters": refs,
            "trajectories": str(experts / "trajectories" / "shared-seed0"),
            "data": {**DATA, "inputs_per_task": 8},
            "fusion": {
                "representation": {"components": 8},
                "vae": {"latent": 4, "hidden": 16},
                "inner": {"loss": "reconstruction"},
                "vae_steps": 60,
                "meta_steps": 20,
                "batch": 4,
            },
            "engine": {"checkpoint_every": 10},
        },
        "search": {
            "suite": "text",
            "experts": str(own),
            "search": {"params.scale": "loguniform(0.05, 2)"},
            "validation": 24,
            "trials": 12,
        },
        "evaluate": {
            "suite": "text",
            "experts": str(own),
            "adapters": [{**ref, "name": f"own-{ref['name']}"} for ref in refs],
            "examples": 200,
        },
        "finetune": finetune_plain(base, output, **training),
        "pipeline": {
            **finetune_plain(base, output, **training),
            "name": "kill",
            "methods": [{"method": "soup"}, {"method": "svd"}],
        },
    }
    return {key: value for key, value in {**plain, **changes[job]}.items() if value is not None}


def write_recipe(root: Path, job: str, plain: dict[str, Any]) -> Path:
    """Write a job's recipe."""
    return write_yaml(root / f"{job}.yaml", plain)
