"""Published defaults stand as `published_defaults.yaml` has them, with their sources."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, astuple
from functools import partial, reduce
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import BaseModel

import icm_ray
from icm_ray.config import DataSpec, FusionSpec, LearnSpec, ObjectiveSpec, OptimisationSpec
from icm_ray.fusion.latent import DIRECT, IN_CONTEXT
from icm_ray.fusion_vae import network
from icm_ray.importing import counterparts
from icm_ray.learning.descent import Descent
from icm_ray.learning.objectives.distillation import Distillation
from icm_ray.learning.objectives.entropy import HeadEntropy
from icm_ray.learning.objectives.module_inputs import Tokens
from icm_ray.learning.objectives.null_space_ratio import NullSpaceRatio
from icm_ray.learning.objectives.row_space_match import RowSpaceMatch
from icm_ray.learning.objectives.supervised import Supervised
from icm_ray.learning.objectives.task_vector_match import TaskVectorMatch
from icm_ray.learning.objectives.token_entropy import TokenEntropy
from icm_ray.learning.recipes import LEARNERS
from icm_ray.learning.targets import Targets
from icm_ray.learning.tasks import load_inputs
from icm_ray.linalg.lowrank import NUMERICAL_RANK
from icm_ray.linalg.subspace import RATIO_FLOOR
from icm_ray.methods import METHODS
from icm_ray.methods.dare_ties import RULES as DARE_TIES
from icm_ray.methods.knots_dare_ties import RULES as KNOTS_DARE_TIES
from icm_ray.methods.knots_ties import RULES as KNOTS_TIES
from icm_ray.methods.ties import RULES as TIES
from icm_ray.suites import SUITES

HERE = Path(__file__).parent
TABLE = yaml.safe_load((HERE / "published_defaults.yaml").read_text())
SPECS: Mapping[str, LearnSpec] = {
    **LEARNERS,
    "icm_fusion latent": IN_CONTEXT,
    "icm_fusion direct": DIRECT,
    "whatever else is not set": LearnSpec(objective=ObjectiveSpec(kind="token_entropy")),
}
OBJECTIVES = (
    *(NullSpaceRatio, RowSpaceMatch, TaskVectorMatch),
    *(HeadEntropy, Distillation, Supervised, TokenEntropy),
)
NO_MATTER = {"save_every"}
"""Fields that decide about no result."""


def leaves(plain: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of mappings within mappings by dotted name."""
    for name, value in plain.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value


def read(start: Any, dotted: str) -> Any:
    return reduce(getattr, dotted.split("."), start)


def weight_left_out(method: str, make_adapter: Callable[..., Any], **preset: str) -> Any:
    """Return the number that gives the merge of four adapters without weights."""
    adapters = [make_adapter(name, shapes={"m": (12, 10)}) for name in "abcd"]

    def merged(**params: Any) -> torch.Tensor:
        result = icm_ray.merge(adapters, method, params={**preset, **params})
        return result.adapter.modules["m"].delta()

    numbers = {"1/K": 0.25, 1.0: 1.0, 2.0: 2.0}
    same = [n for n, w in numbers.items() if torch.equal(merged(weights=[w] * 4), merged())]
    return same[0] if len(same) == 1 else same


METHOD_ROWS = [
    (name, *leaf) for name, row in TABLE["methods"].items() for leaf in row["parameters"].items()
]


@pytest.mark.parametrize(("method", "parameter", "value"), METHOD_ROWS)
def test_a_method_s_parameters_start_as_published(method, parameter, value) -> None:
    assert METHODS[method].parameters()[parameter].default == value, TABLE["methods"][method]


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_of_a_method_has_a_source(method) -> None:
    row = TABLE["methods"][method]
    assert row["source"]
    assert set(row["parameters"]) == set(METHODS[method].parameters())
    assert ("weight" in row) == ("weights" in row["parameters"] and method != "icm_fusion")
    assert METHODS[method].default_rank == row["rank"]


@pytest.mark.parametrize("method", [n for n, row in TABLE["methods"].items() if "weight" in row])
def test_a_task_counts_as_published(make_adapter, method) -> None:
    assert weight_left_out(method, make_adapter) == TABLE["methods"][method]["weight"]


@pytest.mark.parametrize("method", TABLE["weights"])
def test_a_task_counts_as_each_preset_publishes(make_adapter, method) -> None:
    for preset, weight in TABLE["weights"][method].items():
        assert weight_left_out(method, make_adapter, preset=preset) == weight


@pytest.mark.parametrize(("method", "rules"), [("ties", TIES), ("dare_ties", DARE_TIES)])
def test_presets_vote_as_published(method, rules) -> None:
    published = {preset: row["rules"] for preset, row in TABLE["presets"][method].items()}
    assert {preset: asdict(rule) for preset, rule in rules.items()} == published


@pytest.mark.parametrize(
    ("method", "presets"), [("knots_ties", KNOTS_TIES), ("knots_dare_ties", KNOTS_DARE_TIES)]
)
def test_presets_of_one_method_are_another_s(method, presets) -> None:
    assert presets == TABLE["same as"][method]


LEARNER_ROWS = [
    (n, *leaf) for n, row in TABLE["learners"].items() for leaf in leaves(row["values"])
]


@pytest.mark.parametrize(("learner", "dotted", "value"), LEARNER_ROWS)
def test_a_learner_starts_as_published(learner, dotted, value) -> None:
    assert read(SPECS[learner], dotted) == value, TABLE["learners"][learner]["source"]


def fields_set(spec: BaseModel, before: str = "") -> Iterator[str]:
    for name in spec.model_fields_set:
        value = getattr(spec, name)
        if isinstance(value, BaseModel):
            yield from fields_set(value, f"{before}{name}.")
        else:
            yield f"{before}{name}"


@pytest.mark.parametrize("learner", SPECS)
def test_whatever_a_learner_sets_has_a_source(learner) -> None:
    row = TABLE["learners"][learner]
    assert row["source"]
    assert set(fields_set(SPECS[learner])) <= {name for name, _ in leaves(row["values"])}


@pytest.mark.parametrize("recipe", TABLE["recipes"])
def test_shipped_recipes_have_the_published_schedules(recipe) -> None:
    path = HERE.parent / f"configs/learn/{recipe}.yaml"
    learn = yaml.safe_load(path.read_text())["learn"]
    assert learn == {"optimisation": TABLE["recipes"][recipe]["values"]}


FUSION_ROWS = [(who, *leaf) for who, values in TABLE["fusion"].items() for leaf in leaves(values)]


@pytest.mark.parametrize(("source", "dotted", "value"), FUSION_ROWS)
def test_a_fusion_vae_starts_as_published(source, dotted, value) -> None:
    assert read(FusionSpec(), dotted) == value, source


def test_every_field_of_a_fusion_vae_has_a_source() -> None:
    named = {dotted for _, dotted, _ in FUSION_ROWS}
    assert {name for name, _ in leaves(FusionSpec().model_dump())} - NO_MATTER == named


def split_of_inputs() -> str:
    """Return the split that the inputs of a learner come from, by what they are."""
    task = sorted(SUITES["text"].tasks)[0]
    inputs, _ = load_inputs(DataSpec(suite="text", inputs_per_task=8), [task])[task]
    splits = ("train", "calibration", "validation", "test")
    return next(s for s in splits if SUITES["text"].load(task, s, 8).inputs == inputs)


def moments(optimizer: str) -> list[Any]:
    """Return which optimiser moves a learner's parameters, and how it starts."""
    decay = {} if optimizer == "adamw" else {"weight_decay": 0.0}
    how = OptimisationSpec(optimizer=optimizer, **decay)
    made = Descent({"x": torch.zeros(1, requires_grad=True)}, how).optimizer
    group = made.param_groups[0]
    return [type(made).__name__.lower(), *group["betas"], group["eps"], group["weight_decay"]]


def kernels() -> list[int]:
    vae = network.build_vae(FusionSpec().vae.model_copy(update={"preset": "conv"}), [200], 4)
    first = next(m for m in vae.modules() if isinstance(m, torch.nn.Conv1d))
    return [*first.kernel_size, *first.stride, *first.padding]


MOVES = ("optimizer", "weight_decay", "schedule", "reduction", "worst", "task_weights")
CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "split that learners read": split_of_inputs,
    "inputs of a task": lambda: DataSpec().most,
    "targets of the null-space ratio": lambda: list(astuple(NullSpaceRatio().targets)),
    "targets of the row-space match": lambda: list(astuple(RowSpaceMatch().targets)),
    "targets": lambda: list(astuple(Targets())),
    "tokens": lambda: list(astuple(Tokens())),
    "task vectors": lambda: list(astuple(TaskVectorMatch())),
    "what losses are divided by": lambda: {kind.__name__: kind.scaling for kind in OBJECTIVES},
    "floor under the ratio's root": lambda: RATIO_FLOOR,
    "singular values that count": lambda: NUMERICAL_RANK,
    "descent": lambda: [getattr(OptimisationSpec(), name) for name in MOVES],
    "moments of AdamW": partial(moments, "adamw"),
    "moments of Adam": partial(moments, "adam"),
    "numbers in a token of preset paper": lambda: network.CHUNK,
    "channels of preset conv": lambda: list(network.ConvVAE.CHANNELS),
    "kernels of preset conv": kernels,
    "log-variance of an untrained network": lambda: network.START_LOGVAR,
    "density of mergekit": lambda: counterparts.DEFAULTS["density"],
    "gamma of mergekit": lambda: counterparts.DEFAULTS["gamma"],
    "epsilon of mergekit": lambda: counterparts.DEFAULTS["epsilon"],
}


@pytest.mark.parametrize("what", CONSTANTS)
def test_a_constant_is_the_published_one(what) -> None:
    value, source = TABLE["constants"][what]
    assert CONSTANTS[what]() == value, source
