"""The cluster file is one that Ray accepts, closed to strangers, and uploads no outputs."""

import fnmatch
import re
from pathlib import Path

import pytest
import yaml

import icm_ray.distributed  # noqa: F401  sets Ray's environment, so it comes before Ray

ROOT = Path(__file__).resolve().parents[1]
STARTS = ("head_start_ray_commands", "worker_start_ray_commands")


@pytest.fixture(scope="module")
def config():
    return yaml.safe_load((ROOT / "cluster.yaml").read_text())


def ray_start(config, kind):
    (command,) = [line for line in config[kind] if "ray start" in line]
    return command


def test_rays_own_check_accepts_it(config):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(config))


def test_rays_own_check_would_notice(config):
    from jsonschema.exceptions import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    with pytest.raises(ValidationError):
        validate_config(prepare_config({**config, "no_such_key": 1}))


def test_there_are_nodes_with_cpus_and_nodes_with_gpus(config):
    types = config["available_node_types"]
    resources = {name: node["resources"] for name, node in types.items()}
    workers = {name: r for name, r in resources.items() if name != config["head_node_type"]}
    assert any(r.get("CPU", 0) > 0 and not r.get("GPU") for r in workers.values())
    assert any(r.get("GPU", 0) > 0 for r in workers.values())
    # The head schedules and serves the dashboard; work that fills it would slow everything.
    assert resources[config["head_node_type"]]["CPU"] == 0


@pytest.mark.parametrize("kind", STARTS)
def test_every_node_asks_for_the_token(config, kind):
    command = ray_start(config, kind)
    assert "RAY_AUTH_MODE=token" in command
    assert "RAY_AUTH_TOKEN_PATH=~/.ray/icm-ray-token" in command
    assert "chmod 600 ~/.ray/icm-ray-token" in config["setup_commands"]
    assert "~/.ray/icm-ray-token" in config["file_mounts"]


@pytest.mark.parametrize("kind", STARTS)
def test_submitted_jobs_find_the_python_of_the_environment(config, kind):
    command = ray_start(config, kind)
    assert command.startswith('export PATH="$HOME/venv/bin:$PATH";')


def test_no_secret_is_written_down():
    text = (ROOT / "cluster.yaml").read_text()
    assert "RAY_AUTH_TOKEN=" not in text


def test_the_dashboard_is_for_the_head_alone(config):
    assert "--dashboard-host=127.0.0.1" in ray_start(config, STARTS[0])
    assert "dashboard-host" not in ray_start(config, STARTS[1])


def test_our_own_ray_is_the_one_that_is_installed(config):
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert any(line.startswith("ray[") and "==" in line for line in project["dependencies"])
    assert any("pip install -e" in line for line in config["setup_commands"])


@pytest.mark.parametrize("file", ["cluster.yaml", "deploy/Dockerfile"])
def test_nodes_have_what_every_job_imports(file):
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"]) - {"dev", "loggers"}
    installed = re.search(r"\[([\w,]+)\]\"", (ROOT / file).read_text())
    assert installed, "no extras"
    assert set(installed[1].split(",")) == extras


@pytest.mark.parametrize("name", [".rayignore", ".gitignore"])
def test_outputs_are_neither_uploaded_nor_committed(name):
    lines = (ROOT / name).read_text().splitlines()
    patterns = [line.strip().rstrip("/") for line in lines if line and not line.startswith("#")]
    for folder in ("runs", ".venv", "__pycache__"):
        assert any(fnmatch.fnmatch(folder, pattern) for pattern in patterns), folder


def test_shipped_recipes_write_to_the_ignored_folder():
    for path in sorted((ROOT / "configs").rglob("*.yaml")):
        output = yaml.safe_load(path.read_text()).get("output")
        where = output["path"] if isinstance(output, dict) else output or "runs/"
        assert str(where).startswith("runs/"), path
