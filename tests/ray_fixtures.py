"""One local Ray for all default tests, and small real adapters for it to work on.

The rooms whose tests need it name this module as fixtures of theirs.
"""

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

# Sets the token that closes the cluster, so it comes before Ray itself.
import icm_ray.distributed  # noqa: F401  isort: skip
import ray
import torch
from ray_samples import ROOT, finetune_recipe, save_peft, save_tiny_bert, session_on


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray with 4 CPUs and 2 pretended GPUs, ended with the test session."""
    if ray.is_initialized():  # by the tests of another room
        yield
        return
    # Workers import icm_ray and jobs from the working tree, wherever pytest was started.
    os.environ["PYTHONPATH"] = str(ROOT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own, about files it leaves open at start
        ray.init(
            address="local",
            num_cpus=4,
            num_gpus=2,
            resources={"slot": 3},
            include_dashboard=False,
            object_store_memory=300_000_000,
            logging_level="warning",
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
        )
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def on_ray(request: pytest.FixtureRequest) -> None:
    """Every test of such a folder has the session, but those that start a cluster of their own."""
    marks = ("cluster", "slow", "long")
    if getattr(request.module, "OWN_RAY", False) or any(
        request.node.get_closest_marker(name) for name in marks
    ):
        return
    request.getfixturevalue("ray_session")


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random BERT of the other tests, but with room for the texts of the suite."""
    return save_tiny_bert(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="session")
def adapters(tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, Path]]:
    """Five PEFT adapters of the tiny base, with different ranks and targets."""
    root = tmp_path_factory.mktemp("adapters")
    kinds = [
        {"r": 2, "target_modules": ["query", "value"]},
        {"r": 3, "target_modules": ["query", "value"], "use_rslora": True},
        {"r": 4, "lora_alpha": 3, "target_modules": ["query", "value", "key"]},
        {"r": 2, "target_modules": ["query", "value"], "rank_pattern": {"query": 5}},
        {"r": 1, "target_modules": ["value"]},
    ]
    refs = [(f"task{i}", root / f"task{i}") for i in range(len(kinds))]
    for seed, ((_, folder), options) in enumerate(zip(refs, kinds, strict=True)):
        save_peft(tiny_bert, folder, seed, **options)
    return refs


@pytest.fixture
def one_thread() -> Iterator[None]:
    """The serial side of a comparison runs with as many kernel threads as a worker."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def experts(tiny_bert: Path, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of a fine-tuning of two tasks on the tiny base, a few steps each."""
    from icm_ray.workflows.experts import find_or_train

    root = tmp_path_factory.mktemp("experts")
    recipe = finetune_recipe(tiny_bert, root)
    find_or_train(session_on(tiny_bert, **recipe.resources.model_dump()), recipe, root)
    return root
