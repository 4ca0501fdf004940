"""Loggers of Ray Tune that a search may feed: TensorBoard, Weights and Biases, MLflow."""

import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from icm_ray.errors import RecipeError

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
PROJECT = "icm_ray"
"""Project of W&B, unless WANDB_PROJECT names another, and experiment of MLflow."""


def logger(name: str, logs: Path) -> Any:
    """Return one of Tune's loggers.

    Args:
        name: A key of PACKAGES.
        logs: Existing folder of what is not sent to a server: runs of W&B if WANDB_MODE is offline,
            MLflow's store if MLFLOW_TRACKING_URI names no other. TensorBoard's event files come
            there by themselves.
    """
    if name == "tensorboard":
        from ray.tune.logger import TBXLoggerCallback

        return TBXLoggerCallback()
    if name == "wandb":
        from ray.air.integrations.wandb import WandbLoggerCallback

        return WandbLoggerCallback(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            # The process that logs need not have our environment.
            mode=os.environ.get("WANDB_MODE"),
            dir=str(logs.absolute()),
        )
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{logs.absolute()}/mlflow.db"
    return MLflowLoggerCallback(tracking_uri=store, experiment_name=PROJECT)


def check_loggers(names: Sequence[str]) -> None:
    """Raise RecipeError, with all problems, if packages of loggers are missing."""
    missing = [name for name in names if find_spec(PACKAGES[name]) is None]
    if missing:
        raise RecipeError(
            f"loggers: {name} needs the package {PACKAGES[name]}. Install it, or leave it out."
            for name in missing
        )
