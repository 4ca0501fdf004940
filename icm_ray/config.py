"""Recipes: strict YAML that says everything a job does, checked before anything runs.

    load_recipe(MergeRecipe, "configs/merge/soup.yaml", ["output.rank=8", "seed=1"])

Unknown keys are errors with the nearest known key; `key=value` overrides use the same dotted names.
Relative paths are relative to the folder the command runs in.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from icm_ray.errors import InputError, RecipeError, did_you_mean
from icm_ray.types import SavedModulesPolicy

MAX_RECIPE_BYTES = 1_000_000
MAX_DEPTH = 20
STORAGE_VARIABLE = "ICM_RAY_STORAGE"
SUBMITTED_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Ray sets it for the driver of a submitted job."""

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
Positive = Annotated[int, Field(gt=0)]
R = TypeVar("R", bound="Recipe")

_EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")


class Part(BaseModel):
    """Base of all recipe parts: no unknown keys, no silent conversions, no changes later."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Resources(Part):
    """What each actor or worker gets, and how the arithmetic is done on it."""

    workers: Positive | None = Field(
        default=None, description="At most so many; None: as the CPUs allow."
    )
    cpus_per_worker: float = Field(default=1.0, ge=0)
    gpus_per_worker: float = Field(default=0.0, ge=0, description="May be a fraction.")
    memory_per_worker: Positive | None = Field(default=None, description="Bytes to reserve.")
    custom: dict[str, float] = Field(default={}, description="Custom Ray resources, name: amount.")
    threads: Positive = Field(
        default=1, description="Kernel threads; part of what makes bytes equal."
    )
    device: str = Field(default="cpu", pattern=r"^(cpu|cuda(:\d+)?|mps|xpu)$")
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    backend: Literal["gloo", "nccl"] = "gloo"
    timeout_seconds: Positive = Field(
        default=1800, description="Longest wait for one piece of work."
    )


class AdapterRef(Part):
    """One adapter of a merge: a name that is its task's, and a PEFT folder."""

    name: Name
    path: str = Field(min_length=1)


class DataSpec(Part):
    """Which inputs methods that gather evidence may see."""

    suite: str | None = Field(default=None, description="A name in SUITES.")
    path: str | None = Field(
        default=None, description="Folder with <task>.jsonl or <task>.parquet."
    )
    split: str = "calibration"
    inputs_per_task: Positive = 64


class Output(Part):
    """Where the merged adapter goes and in which form."""

    path: str = Field(min_length=1)
    rank: int | str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


class Recipe(Part):
    """What every job's recipe has."""

    storage: str | None = Field(default=None, description="Folder that relative outputs are in.")
    resources: Resources = Resources()
    seed: int = Field(default=0, ge=0)
    cache: str | None = Field(
        default=None, description="Where bases are kept; default ICM_RAY_CACHE."
    )

    @property
    def output_path(self) -> str:
        """The recipe's output folder as written, relative to the storage root."""
        output = getattr(self, "output")  # noqa: B009 - declared by the subclasses
        return output.path if isinstance(output, Output) else output


class MergeRecipe(Recipe):
    """Recipe of `icm-ray plan`, `icm-ray merge` and `jobs.merge`."""

    base: str | None = Field(
        default=None, description="Alias, folder or hub id; optional if data-free."
    )
    revision: str | None = None
    adapters: list[AdapterRef] = Field(min_length=1, max_length=10_000)
    method: str
    params: dict[str, Any] = {}
    evidence: str | None = None
    data: DataSpec | None = None
    modules_to_save: SavedModulesPolicy = "refuse"
    output: Output


class PrepareRecipe(Recipe):
    """Recipe of `jobs.prepare`: fetch a suite's base and data once."""

    suite: str | None = "text"
    base: str | None = None
    revision: str | None = None
    output: str = "runs/prepare"


class LoRARecipe(Part):
    """Shape of the adapters that `jobs.finetune` trains."""

    rank: Positive = 8
    alpha: Positive = 16
    targets: list[str] | str = ["query", "key", "value", "attention.output.dense"]


class Training(Part):
    """How one expert is trained."""

    steps: Positive = 200
    batch: Positive = 32
    lora_lr: float = Field(default=5e-3, gt=0)
    head_lr: float = Field(default=5e-3, gt=0)
    train_examples: Positive = 4800
    checkpoints: Positive = Field(
        default=16, description="Kept from the second half, evenly spaced."
    )
    save_every: Positive = Field(
        default=50, description="Steps between states a killed run resumes from."
    )


class ExpertSet(Part):
    """One full set of experts: how A starts, and the seed of everything random."""

    init: Literal["shared", "own"] = "shared"
    seed: int = Field(default=0, ge=0)

    @property
    def label(self) -> str:
        """Name of the set in folders and tables."""
        return f"{self.init}-seed{self.seed}"


class Sizes(Part):
    """How many examples each split uses; the same first n for everybody."""

    calibration: Positive = 128
    validation: Positive = 256
    test: Positive = 256


class FinetuneRecipe(Recipe):
    """Recipe of `jobs.finetune`: K experts on one base."""

    suite: str = "text"
    tasks: list[str] | None = Field(default=None, description="None: every task of the suite.")
    base: str | None = Field(default=None, description="None: the suite's own.")
    revision: str | None = None
    lora: LoRARecipe = LoRARecipe()
    training: Training = Training()
    sets: list[ExpertSet] = [ExpertSet()]
    sizes: Sizes = Sizes()
    dtype: Literal["float32", "float16"] = "float32"
    output: str = Field(min_length=1)


class EvidenceRecipe(Recipe):
    """Recipe of `jobs.evidence`: task vectors and null-space ratios of K adapters."""

    base: str
    revision: str | None = None
    adapters: list[AdapterRef] = Field(min_length=1)
    data: DataSpec
    batch: Positive = 32
    modules_to_save: SavedModulesPolicy = "refuse"
    output: str = Field(min_length=1)


class EvaluateRecipe(Recipe):
    """Recipe of `jobs.evaluate`: score adapters on a suite's tasks against its experts."""

    suite: str = "text"
    experts: str = Field(min_length=1, description="Folder of one expert set.")
    base: str | None = None
    revision: str | None = None
    adapters: list[AdapterRef] = Field(min_length=1)
    split: Literal["validation", "test"] = "test"
    examples: Positive = 256
    batch: Positive = 64
    output: str = Field(min_length=1)


class MethodRow(Part):
    """One row of a results table: a method, its parameters and what may be tuned."""

    label: Name | None = None
    method: str
    params: dict[str, Any] = {}
    rank: int | str | None = None
    grid: dict[str, list[float]] = Field(default={}, description="Tried on validation data only.")

    @property
    def name(self) -> str:
        """Label of the row; the method's name unless given."""
        return self.label or self.method


class PipelineRecipe(Recipe):
    """Recipe of `jobs.pipeline`: prepare, finetune, evidence, merge, evaluate, report."""

    name: Name
    suite: str = "text"
    base: str | None = None
    revision: str | None = None
    tasks: list[str] | None = None
    lora: LoRARecipe = LoRARecipe()
    training: Training = Training()
    sets: list[ExpertSet] = [ExpertSet()]
    sizes: Sizes = Sizes()
    dtype: Literal["float32", "float16"] = "float32"
    experts: str | None = Field(
        default=None, description="Ready experts of this very recipe, if any."
    )
    methods: list[MethodRow] = Field(min_length=1)
    output: str = Field(min_length=1)


Shape = Annotated[list[Positive], Field(min_length=2, max_length=2)]
"""`[d_out, d_in]` of a weight."""


class BenchmarkRecipe(Recipe):
    """Recipe of `jobs.benchmark`: ours and PEFT side by side, and memory over many adapters."""

    methods: list[str] = Field(
        default=["cat", "svd"], description="Compared with PEFT's of that name."
    )
    layers: dict[str, Shape] = {"q_proj": [4096, 4096], "v_proj": [1024, 4096]}
    adapters: Positive = 6
    rank: Positive = 16
    repeats: Positive = 9
    peft_repeats: dict[str, Positive] = Field(default={"svd": 1}, description="Where PEFT is slow.")
    whole_model: int = Field(
        default=0, ge=0, description="So many times `layers`, read and merged by svd."
    )
    many: list[Positive] = Field(
        default=[], description="Numbers of adapters whose memory is compared."
    )
    many_methods: list[MethodRow] = [MethodRow(method="svd", rank=16)]
    many_shape: Shape = [1024, 1024]
    many_modules: Positive = 24
    output: str = Field(min_length=1)


def load_recipe(kind: type[R], path: str | Path, overrides: Sequence[str] = ()) -> R:
    """Read, override and check a recipe.

    Args:
        kind: The recipe class.
        path: YAML file, at most 1 MB.
        overrides: `dotted.key=value`; values are YAML.

    Raises:
        RecipeError: every problem of the file and the overrides, one line each.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    source = Path(path)
    values = _read_yaml(source)
    # An override may hold a pasted secret as well, so only its key is repeated.
    keys = [override.partition("=")[0] for override in overrides]
    for key, override in zip(keys, overrides, strict=True):
        if not re.match(r"^[A-Za-z_][\w.\[\]-]*=", override):
            raise RecipeError(f"{key}: not of the form key=value. Write for example seed=1.")
    try:
        config = OmegaConf.create(values)
        config.merge_with_dotlist(list(overrides))
        plain = OmegaConf.to_container(config)  # no interpolation: a recipe says what it says
        return kind.model_validate(plain)
    except ValidationError as error:
        raise RecipeError([_problem(kind, source, item) for item in error.errors()]) from None
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError, IndexError) as error:
        where = f"with {', '.join(keys)} set: " if keys else ""
        what = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise RecipeError(f"{source}: {where}{what}. Write plain YAML values.") from None


def _read_yaml(source: Path) -> dict[str, Any]:
    import yaml

    if not source.is_file():
        raise RecipeError(f"{source}: no such recipe. Look in configs/ for ready ones.")
    if source.stat().st_size > MAX_RECIPE_BYTES:
        raise RecipeError(f"{source}: over {MAX_RECIPE_BYTES} bytes. A recipe is a short text.")
    try:
        text = source.read_text(encoding="utf-8")
        _check_events(source, text)
        values = yaml.safe_load(text)
    except UnicodeDecodeError:
        raise RecipeError(f"{source}: not UTF-8. Save it as UTF-8.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1}: " if mark else ""
        what = getattr(error, "problem", None) or type(error).__name__
        raise RecipeError(f"{source}: {where}not plain YAML ({what}).") from None
    except ValueError as error:  # a date or number that looks like one and is none
        raise RecipeError(f"{source}: not plain YAML ({error}).") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise RecipeError(f"{source}: {type(values).__name__} but a table of keys is expected.")
    return values


def _check_events(source: Path, text: str) -> None:
    """Refuse aliases, deep nesting, and a key given twice, of which YAML would take the last.

    Reads the text as a stream and stops at the first of these, so none can exhaust anything.
    """
    import yaml

    open_tables: list[set[str] | None] = []  # the keys of each open table; None for a list
    key_next: list[bool] = []
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):  # an alias bomb needs them; no recipe does
            raise RecipeError(f"{source}: YAML aliases (*name) are not allowed. Write it out.")
        if isinstance(event, yaml.CollectionEndEvent):
            open_tables.pop()
            key_next.pop()
        elif isinstance(event, yaml.NodeEvent):
            seen = open_tables[-1] if open_tables else None
            if seen is not None:
                if key_next[-1] and isinstance(event, yaml.ScalarEvent):
                    if event.value in seen:
                        raise RecipeError(
                            f"{source}: line {event.start_mark.line + 1}: {event.value}: twice. "
                            "Keep one of them."
                        )
                    seen.add(event.value)
                key_next[-1] = not key_next[-1]
            if isinstance(event, yaml.CollectionStartEvent):
                open_tables.append(set() if isinstance(event, yaml.MappingStartEvent) else None)
                key_next.append(True)
        if len(open_tables) > MAX_DEPTH:
            raise RecipeError(f"{source}: nested too deeply. A recipe is flat.")


def _problem(kind: type[BaseModel], source: Path, item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _keys_at(kind, item["loc"][:-1])
        near = did_you_mean(str(item["loc"][-1]), known)
        return f"{source}: {where}: unknown key.{near} Known: {', '.join(known)}."
    if item["type"] == "missing":
        return f"{source}: {where}: missing. Add it."
    # A recipe may hold a pasted secret, so only short plain values are repeated.
    value = item["input"]
    shown = f"{value!r}: " if isinstance(value, int | float | bool) else ""
    hint = ""
    if item["type"] == "float_type" and isinstance(value, str) and _EXPONENT.fullmatch(value):
        hint = " YAML takes 1e-3 for text. Write 1.0e-3."
    return f"{source}: {where}: {shown}{item['msg']}.{hint}"


def _keys_at(kind: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    """Return the known keys of the part at `location`, following nested models and lists."""
    import typing

    current: Any = kind
    for part in location:
        if isinstance(part, int):
            continue
        annotation = current.model_fields[part].annotation
        options = [annotation, *typing.get_args(annotation)]
        models = [o for o in options if isinstance(o, type) and issubclass(o, BaseModel)]
        if not models:
            return []
        current = models[0]
    return list(current.model_fields)


def storage_root(recipe: Recipe) -> str | None:
    """Return the root of relative outputs: the recipe's, else the environment's, else None."""
    return recipe.storage or os.environ.get(STORAGE_VARIABLE)


def output_folder(recipe: Recipe, output: str) -> Path:
    """Return the local folder for `output`, under the storage root if it is relative.

    Raises:
        RecipeError: the job runs from a submitted, unpacked copy of a working directory and the
            output would vanish with it.
    """
    root = storage_root(recipe)
    target = Path(root) / output if root else Path(output)
    if not target.is_absolute() and SUBMITTED_JOB_VARIABLE in os.environ:
        raise RecipeError(
            f"output: {output!r} is relative, but a submitted job runs in a copy of the working "
            f"directory that is thrown away. Set storage: or {STORAGE_VARIABLE}."
        )
    return target.absolute()

