"""A Fusion-VAE from adapters and their checkpoints in one process, start to end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from torch import Tensor, nn

from icm_ray.config import FusionSpec
from icm_ray.errors import RecipeError
from icm_ray.fusion.base_side import BaseSide
from icm_ray.fusion.data import FusionTable, Sample
from icm_ray.fusion.meta import MetaTraining
from icm_ray.fusion.train import Progress, finished, train
from icm_ray.learning.inputs import TaskInputs
from icm_ray.types import Adapter
from icm_ray.vae.layout import Layout
from icm_ray.vae.model import FusionModel

FUSES = "FusionModel"
"""What methods need that merge with a Fusion-VAE, as their METHODS rows say."""
HEAD_LOSSES: Mapping[str, str] = {"task": "supervised", "entropy": "entropy"}
"""Inner losses that read heads, by the learner's name of them."""


@dataclass(frozen=True)
class Checkpoints:
    """What a Fusion-VAE is trained on, apart from the base.

    Attributes:
        samples: Checkpoints and the finished adapter of every task.
        vectors: `(d,)` task vector (Eq. 1) of every task.
    """

    samples: Sequence[Sample]
    vectors: Mapping[str, Tensor]


def fusion_spec_of(changes: Mapping[str, Any]) -> FusionSpec:
    """Return the default recipe of a Fusion-VAE with changes, parts within parts.

    Raises:
        RecipeError: changes name what does not exist, or a value is out of range.
    """
    try:
        return FusionSpec.model_validate(_changed(FusionSpec().model_dump(), changes))
    except ValidationError as error:
        lines = [f"fusion.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise RecipeError(lines) from None


def _changed(plain: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(plain)
    for name, value in changes.items():
        inside = found.get(name)
        both = isinstance(inside, Mapping) and isinstance(value, Mapping)
        found[name] = _changed(inside, value) if both else value  # type: ignore[arg-type]
    return found


def runs_base(spec: FusionSpec) -> bool:
    """Say whether training runs the base and its inputs."""
    return spec.meta_steps > 0 and spec.inner.loss != "reconstruction"


def reads_heads(spec: FusionSpec) -> bool:
    """Say whether training reads the experts' heads."""
    return runs_base(spec) and spec.inner.loss in HEAD_LOSSES


def train_fusion(
    spec: FusionSpec,
    adapters: Sequence[Adapter],
    known: Checkpoints,
    *,
    base: nn.Module | None = None,
    tasks: Sequence[TaskInputs] = (),
    seed: int = 0,
    threads: int = 1,
    progress: Progress | None = None,
) -> FusionModel:
    """Train on one process what `jobs.train_fusion` trains with DeepSpeed on many.

    Args:
        spec: Representation, network and both stages.
        adapters: The finished adapter of every task.
        known: Checkpoints and task vectors.
        base: The frozen base; None where `runs_base` is false.
        tasks: Inputs of every task for the inner loss.
        seed: Keys the weights and every draw.
        threads: Kernel threads.
        progress: Told about each step.

    Raises:
        RecipeError: the inner loss does not fit the tasks, or the loss is no number any more.
    """
    kinds = {path: kind for adapter in adapters for path, kind in adapter.layouts.items()}
    layout = Layout.fit(spec.representation, known.samples, kinds)
    table = FusionTable.of(layout, known.samples, known.vectors)
    side = BaseSide(base, tasks) if runs_base(spec) and base is not None else None
    meta = MetaTraining.build(spec, layout, table, side, seed)
    history = train(meta, threads=threads, progress=progress)
    if history and history[-1]["loss"] != history[-1]["loss"]:
        raise RecipeError("fusion: the loss is no number. Lower fusion.lr and fusion.meta_lr.")
    return finished(meta, history, adapters)
