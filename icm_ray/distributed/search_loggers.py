"""Loggers of Ray Tune that a search may feed: TensorBoard, Weights and Biases, MLflow."""

import os
from collections.abc import Sequence
from typing import Any

from icm_ray.errors import RecipeError

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}


def logger(name: str) -> Any:
    """Return one of Tune's loggers.

    Raises:
        RecipeError: its package is not installed.
    """
    try:
        __import__(PACKAGES[name])
    except ImportError:
        raise RecipeError(
            f"loggers: {name} needs the package {PACKAGES[name]}. Install it, or leave it out."
        ) from None
    if name == "tensorboard":
        from ray.tune.logger import TBXLoggerCallback

        return TBXLoggerCallback()
    if name == "wandb":
        from ray.air.integrations.wandb import WandbLoggerCallback

        return WandbLoggerCallback(project=os.environ.get("WANDB_PROJECT", "icm_ray"))
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    return MLflowLoggerCallback(experiment_name="icm_ray")


def check_loggers(names: Sequence[str]) -> None:
    """Raise RecipeError if a logger's package is missing."""
    for name in names:
        logger(name)
