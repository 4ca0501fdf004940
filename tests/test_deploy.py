"""What starts the jobs on Kubernetes and Slurm: checked without a cluster of either."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any, Literal

import kubernetes_validate
import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field
from ray_samples import environment

import icm_ray

ROOT = Path(__file__).resolve().parents[1]
SLURM = ROOT / "deploy" / "slurm.sh"


class Strict(BaseModel):
    """Fields of KubeRay's API reference for ray.io/v1 that the file may use."""

    model_config = ConfigDict(extra="forbid")


class Template(Strict):
    spec: dict[str, Any]


class Head(Strict):
    rayStartParams: dict[str, str]
    template: Template


class Workers(Head):
    groupName: str = Field(pattern=r"^[a-z0-9-]{1,63}$")
    replicas: int = Field(ge=0)
    minReplicas: int = Field(ge=0)
    maxReplicas: int = Field(ge=1)


class Auth(Strict):
    mode: Literal["token"]


class Cluster(Strict):
    rayVersion: str
    authOptions: Auth
    headGroupSpec: Head
    workerGroupSpecs: list[Workers]


class Job(Strict):
    entrypoint: str
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: int
    backoffLimit: int
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]
    rayClusterSpec: Cluster


class Named(Strict):
    name: str = Field(pattern=r"^[a-z0-9-]{1,47}$")


class RayJob(Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Named
    spec: Job


@pytest.fixture(scope="module")
def job() -> RayJob:
    return RayJob.model_validate(yaml.safe_load((ROOT / "deploy/rayjob.yaml").read_text()))


def test_every_pod_is_one_that_kubernetes_accepts(job) -> None:
    cluster = job.spec.rayClusterSpec
    for group in (cluster.headGroupSpec, *cluster.workerGroupSpecs):
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "one"},
            "spec": group.template.spec,
        }
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
        (container,) = group.template.spec["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in group.template.spec["volumes"]}


def test_there_are_nodes_with_gpus_and_without_and_the_head_computes_nothing(job) -> None:
    cluster = job.spec.rayClusterSpec
    assert cluster.headGroupSpec.rayStartParams["num-cpus"] == "0"
    gpus = [
        "nvidia.com/gpu" in group.template.spec["containers"][0]["resources"]["limits"]
        for group in cluster.workerGroupSpecs
    ]
    assert sorted(gpus) == [False, True]
    assert all(w.minReplicas <= w.replicas <= w.maxReplicas for w in cluster.workerGroupSpecs)


def test_the_cluster_s_ray_is_ours(job) -> None:
    (pinned,) = re.findall(r'"ray\[.*\]==([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert job.spec.rayClusterSpec.rayVersion == pinned


def test_the_line_that_it_starts_is_a_job_s(job) -> None:
    from icm_ray.config import MergeRecipe
    from icm_ray.config.loading import load_recipe

    python, flag, module, option, recipe, *overrides = shlex.split(job.spec.entrypoint)
    assert (python, flag, module, option) == ("python", "-m", "jobs.merge", "-c")
    loaded = load_recipe(MergeRecipe, ROOT / recipe, overrides)
    assert loaded.storage == "/mnt/shared/icm_ray"
    assert str(loaded.cache) == "/mnt/shared/cache"


def test_the_slurm_script_is_one_that_bash_reads() -> None:
    subprocess.run(["bash", "-n", SLURM], check=True)
    line = subprocess.run(["bash", SLURM], capture_output=True, text=True, check=False)
    assert line.returncode == 2
    assert "usage: sbatch" in line.stderr


STAND_INS = """
scontrol() { echo one; echo two; }
srun() {
  while [[ $1 == -* ]]; do [[ $1 == -w ]] && shift; shift; done
  [[ $1 == hostname ]] && { echo 127.0.0.1; return; }
  exec "$@"
}
export -f scontrol srun
"""
"""One machine in the place of two: each starts a Ray node of its own there."""


@pytest.mark.cluster
def test_a_merge_on_two_nodes_of_an_allocation(make_adapter, free_tcp_port, tmp_path) -> None:
    for name in ("one", "two"):
        icm_ray.save_adapter(make_adapter(name), tmp_path / name)
    merge = {"adapters": [str(tmp_path / name) for name in ("one", "two")], "method": "soup"}
    recipe = tmp_path / "merge.yaml"
    recipe.write_text(yaml.safe_dump({**merge, "output": {"path": str(tmp_path / "out")}}))
    count = "import ray; ray.init(); print(sum(n['Alive'] for n in ray.nodes()), 'nodes')"
    line = f"python -c {shlex.quote(count)}; python -m jobs.merge -c {recipe}"
    allocation = environment(
        SLURM_JOB_NODELIST="both", SLURM_CPUS_PER_TASK="1", ICM_RAY_PORT=str(free_tcp_port)
    )
    script = f"{STAND_INS}\nbash {SLURM} bash -c {shlex.quote(line)}"
    ended = subprocess.run(
        ["bash", "-c", script],
        env=allocation,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "2 nodes" in ended.stdout
    assert (tmp_path / "out" / "manifest.json").is_file()
    assert not list(tmp_path.glob(".icm-ray-*")), "the token outlives the job"
