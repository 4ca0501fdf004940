"""What is minimised: one file an objective, one row each in OBJECTIVES.

To add one: write `learning/objectives/<name>.py` with a frozen value whose `of(inputs)` makes one
task's objective (see `protocol.py`), add a row here and its name to `config.ObjectiveKind`. Which
heads and labels a learner is given, what a search may measure, what an inner loss of the
Fusion-VAE or a latent may descend on: all read the row.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from icm_ray.base_model.decoding import Readout, readout_of
from icm_ray.base_model.loading import Base
from icm_ray.config import ObjectiveSpec
from icm_ray.learning.objectives.distillation import Distillation
from icm_ray.learning.objectives.entropy import HeadEntropy
from icm_ray.learning.objectives.module_inputs import Tokens
from icm_ray.learning.objectives.null_space_ratio import NullSpaceRatio
from icm_ray.learning.objectives.protocol import Objective, Scaling
from icm_ray.learning.objectives.row_space_match import RowSpaceMatch
from icm_ray.learning.objectives.supervised import Supervised
from icm_ray.learning.objectives.task_vector_match import TaskVectorMatch
from icm_ray.learning.objectives.token_entropy import TokenEntropy
from icm_ray.learning.targets import Targets


@dataclass(frozen=True)
class ObjectiveRow:
    """One row of the OBJECTIVES table.

    Attributes:
        make: `(spec, base)` returns the objective; without a base, one that knows which tasks it
            covers, but reads no tokens.
        meaning: One line for tables.
        reads_heads: Whether it looks through the experts' heads whatever the recipe says.
        reads_labels: Whether it looks at labels or answers.
        is_measured: Whether a search may judge finished merges by it; smaller is better.
        moves_latents: Whether fusion in context may descend on it: a comparison with the experts.
        inner: What the Fusion-VAE's inner losses call it, if it is one.
    """

    make: Callable[[ObjectiveSpec, Base | None], Objective]
    meaning: str
    reads_heads: bool = False
    reads_labels: bool = False
    is_measured: bool = False
    moves_latents: bool = False
    inner: str | None = None


def _targets(spec: ObjectiveSpec) -> Targets:
    names: Any = spec.names if isinstance(spec.names, str) else tuple(spec.names)
    return Targets(names, None if spec.blocks is None else tuple(spec.blocks), spec.share)


def _tokens(spec: ObjectiveSpec) -> Tokens:
    return Tokens(spec.padding, spec.skip_first)


def _readout(base: Base | None) -> Readout | None:
    """Return a language model's head; other bases have none."""
    return readout_of(base) if base is not None and reads_tokens(base) else None


def _end(base: Base | None) -> int | None:
    """Return the token that ends a language model's answer."""
    return base.tokenizer.eos_token_id if base is not None and reads_tokens(base) else None


def _token_entropy(spec: ObjectiveSpec, base: Base | None) -> TokenEntropy:
    if base is None:
        return TokenEntropy(None, spec.max_new_tokens, None, spec.reduction)
    end = base.tokenizer.eos_token_id  # and readout_of refuses what is no language model
    return TokenEntropy(readout_of(base), spec.max_new_tokens, end, spec.reduction)


def _distillation(spec: ObjectiveSpec, base: Base | None) -> Distillation:
    scaling: Scaling = "larger" if spec.unit == "larger" else "energy"
    return Distillation(_readout(base), _end(base), spec.temperature, scaling)


OBJECTIVES: Mapping[str, ObjectiveRow] = {
    "null_space_ratio": ObjectiveRow(
        lambda spec, _base: NullSpaceRatio(_targets(spec), _tokens(spec)),
        meaning="share of inputs that each A maps to nothing",
        is_measured=True,
        inner="null_space_ratio",
    ),
    "row_space_match": ObjectiveRow(
        lambda spec, _base: RowSpaceMatch(_targets(spec), _tokens(spec)),
        meaning="error of inputs as seen through each A",
        is_measured=True,
    ),
    "task_vector_match": ObjectiveRow(
        lambda spec, _base: TaskVectorMatch(heads=spec.heads),
        meaning="error of the change of the hidden state",
        is_measured=True,
        moves_latents=True,
        inner="task_vector",
    ),
    "entropy": ObjectiveRow(
        lambda _spec, base: HeadEntropy(_readout(base)),
        meaning="entropy of the heads' class probabilities",
        reads_heads=True,
        is_measured=True,
        inner="entropy",
    ),
    "token_entropy": ObjectiveRow(
        _token_entropy,
        meaning="entropy of a language model's next tokens",
    ),
    "distillation": ObjectiveRow(
        _distillation,
        meaning="distance of the answers from the expert's",
        reads_heads=True,
        moves_latents=True,
    ),
    "supervised": ObjectiveRow(
        lambda _spec, base: Supervised(_readout(base)),
        meaning="error of the answers on a few labels",
        reads_heads=True,
        reads_labels=True,
        inner="task",
    ),
}

INNER: Mapping[str, str] = {row.inner: name for name, row in OBJECTIVES.items() if row.inner}
"""Objective by the name that the Fusion-VAE's inner losses give it; each runs the base."""


def objective_of(spec: ObjectiveSpec, base: Base | None) -> Objective:
    """Return the objective a recipe names; a language model's head comes from the base."""
    return OBJECTIVES[spec.kind].make(spec, base)


def refuse_unreached(spec: ObjectiveSpec, modules: Iterable[str]) -> None:
    """Raise InputError if an objective looks at inputs that no merge of `modules` changes."""
    objective = objective_of(spec, None)
    if isinstance(objective, NullSpaceRatio | RowSpaceMatch):
        objective.targets.refuse_unreached(modules)


def reads_heads(spec: ObjectiveSpec) -> bool:
    """Say whether an objective reads the experts' heads."""
    return OBJECTIVES[spec.kind].reads_heads or spec.heads


def reads_tokens(base: Base) -> bool:
    """Say whether a base is a language model with its head."""
    return base.whole is not base.model
