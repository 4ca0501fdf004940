"""What several recipes share: resources, adapters, data, outputs, and how parts are changed."""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from icm_ray.config.places import EARLIER_OUTPUT
from icm_ray.errors import RecipeError
from icm_ray.kinds import CutMetric

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")]
Positive = Annotated[int, Field(gt=0)]
INSECURE_VARIABLE = "ICM_RAY_INSECURE_CLUSTER"
"""Environment variable; 1, or a job's `--insecure-cluster`: an open cluster may be joined."""
ALLOW_CODE_VARIABLE = "ICM_RAY_ALLOW_CODE"
"""Environment variable; 1, or a recipe's `allow_code: true`: scorers beside a suite may run."""


class Part(BaseModel):
    """Base of all recipe parts: no unknown keys, no silent conversions, no changes later."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, defer_build=True)


Spec = TypeVar("Spec", bound=Part)


def changed(spec: Spec, changes: Mapping[str, Any], where: str) -> Spec:
    """Return a part of a recipe with changes, parts within parts; `where` names it in errors.

    Raises:
        RecipeError: changes name what does not exist, or a value is out of range.
    """
    try:
        return type(spec).model_validate(laid_over(spec.model_dump(), changes))
    except ValidationError as error:
        lines = [f"{where}.{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise RecipeError(lines) from None


def laid_over(plain: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain data with changes, tables within tables."""
    merged = dict(plain)
    for name, value in changes.items():
        inside = merged.get(name)
        both = isinstance(inside, Mapping) and isinstance(value, Mapping)
        merged[name] = laid_over(inside, value) if both else value  # type: ignore[arg-type]
    return merged


class Resources(Part):
    """What each actor or worker gets, and how the arithmetic is done on it."""

    workers: Positive | None = Field(
        default=None, description="At most so many; None: as the CPUs allow."
    )
    cpus_per_worker: float = Field(default=1.0, ge=0)
    gpus_per_worker: float = Field(
        default=0.0,
        ge=0,
        description="May be a fraction; over several, device cuda, a base is spread by blocks.",
    )
    memory_per_worker: Positive | None = Field(default=None, description="Bytes to reserve.")
    custom: dict[str, float] = Field(default={}, description="Custom Ray resources, name: amount.")
    threads: Positive = Field(
        default=1, description="Kernel threads; part of what makes bytes equal."
    )
    device: str = Field(
        default="cpu",
        pattern=r"^(cpu|cuda(:\d+)?)$",
        description="cpu or cuda; float64 is computed, which mps has not.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="Precision the base runs in; None: as it is stored."
    )
    offload: bool = Field(
        default=False,
        description="Blocks of the base stay in the node's memory and are on the GPU while they "
        "run: for bases that do not fit.",
    )
    grams: str = Field(
        default="full",
        pattern=r"^(full|diagonal|low_rank:[1-9]\d{0,4})$",
        description="Form of Gram statistics that are gathered: full, low_rank:R (the strongest R "
        "directions, and the diagonal of the rest) or diagonal.",
    )
    backend: Literal["gloo", "nccl"] = "gloo"
    timeout_seconds: Positive = Field(
        default=1800, description="Longest wait for one piece of work."
    )
    on_broken_task: Literal["refuse", "evict"] = Field(
        default="refuse",
        description="Of a task whose workers die each time: end, or go on without it.",
    )

    @model_validator(mode="after")
    def _spread(self) -> "Resources":
        if self.gpus_per_worker > 1 and not self.gpus_per_worker.is_integer():
            raise ValueError("gpus_per_worker: above 1 a whole number is expected")
        if self.gpus_per_worker > 1 and self.device != "cuda":
            raise ValueError("gpus_per_worker: several need device cuda, without a number")
        if self.offload and (self.device == "cpu" or self.gpus_per_worker > 1):
            raise ValueError("offload: needs device cuda and one GPU a worker")
        return self

    @property
    def gram_directions(self) -> int | None:
        """How many directions a Gram keeps beside its diagonal; None: the whole."""
        if self.grams == "full":
            return None
        return int(self.grams.partition(":")[2] or 0)

    @property
    def whole_gpus(self) -> int:
        """Over how many devices a worker spreads its base."""
        return max(1, int(self.gpus_per_worker))


class AdapterRef(Part):
    """One adapter of a merge: a name that is its task's, and where it is."""

    name: Name
    path: Annotated[str, EARLIER_OUTPUT] = Field(
        min_length=1,
        description="Folder or file in a known format; or a repository: org/name from the local "
        "Hugging Face cache, org/name@REVISION also from the hub.",
    )

    @property
    def pair(self) -> tuple[str, Path]:
        """Name and folder."""
        return self.name, Path(self.path)


_REVISION = re.compile(r"^(\w[\w.-]*/\w[\w.-]*)@[\w./-]+$")
"""Of a repository's id; the @ of a folder is part of its name."""


def folder_names(paths: Iterable[str]) -> list[str]:
    """Return names by folders, files or repositories, with as many parents as tell them apart.

    `runA/checkpoint-500` and `runB/checkpoint-500` become `runA-checkpoint-500` and so on.
    """
    bare = (
        path if os.path.isdir(path) else _REVISION.sub(r"\1", path).removesuffix(".safetensors")
        for path in paths
    )
    parts = [Path(os.path.abspath(os.path.expanduser(path))).parts[1:] for path in bare]
    depths = [1] * len(parts)
    for _ in range(max(map(len, parts), default=0)):
        names = ["-".join(path[-depth:]) for path, depth in zip(parts, depths, strict=True)]
        seen = Counter(map(str.casefold, names))
        depths = [d + (seen[n.casefold()] > 1) for n, d in zip(names, depths, strict=True)]
    return ["-".join(path[-depth:]) for path, depth in zip(parts, depths, strict=True)]


def with_names(refs: Any) -> Any:
    """Return a list of paths, the short form of adapters, as references named by their folders."""
    if not isinstance(refs, list) or not refs or not all(isinstance(ref, str) for ref in refs):
        return refs
    names = (re.sub(r"[^A-Za-z0-9_.-]", "_", name) for name in folder_names(refs))
    plain = (name[-100:].lstrip("_.-") for name in names)
    return [{"name": name, "path": path} for name, path in zip(plain, refs, strict=True)]


_Named = Annotated[
    list[AdapterRef],
    BeforeValidator(with_names, json_schema_input_type=list[AdapterRef] | list[str]),
]
Adapters = Annotated[_Named, Field(min_length=1, max_length=10_000)]
"""Adapters by name and path, or paths alone."""
ReadyAdapters = Annotated[
    _Named,
    Field(max_length=10_000, description="Ready ones, each by its task's name; none: trained."),
]
"""Adapters that take the place of experts that would be trained."""


SUITE = "A built-in suite's name, or a folder with suite.yaml."
USUAL_INPUTS = 64
"""Unlabelled inputs a task."""


class DataSpec(Part):
    """Which inputs methods that gather evidence may see."""

    suite: str | None = Field(default=None, description=SUITE)
    path: str | None = Field(
        default=None, description="Folder with <task>.jsonl or <task>.parquet."
    )
    split: str = "calibration"
    inputs_per_task: Positive | None = Field(
        default=None, description="None: 64, or the whole split of a user's suite."
    )

    @property
    def most(self) -> int:
        """Inputs a task of anything but a user's suite."""
        return self.inputs_per_task or USUAL_INPUTS


class Output(Part):
    """Where the merged adapter goes and in which form."""

    path: str = Field(min_length=1)
    rank: int | str | None = None
    metric: CutMetric | None = Field(
        default=None,
        description="What a cut to the rank keeps most of: what the inputs behind the Gram "
        "statistics see, or entries of the weights. None: inputs where the method has them.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_path(cls, values: Any) -> Any:
        """Take a folder alone, the short form."""
        return {"path": values} if isinstance(values, str) else values


class Recipe(Part):
    """What every job's recipe has."""

    can_evict: ClassVar[bool] = False
    """Whether the job can go on without a task."""
    can_gather: ClassVar[bool] = False
    """Whether the job may gather Gram statistics."""

    storage: str | None = Field(default=None, description="Folder that relative outputs are in.")
    resources: Resources = Resources()
    seed: int = Field(default=0, ge=0)
    allow_code: bool = Field(
        default=False,
        description="Run what is code beside a suite: its scorers, its files of lm-eval.",
    )
    cache: str | None = Field(
        default=None, description="Where bases are kept; default ICM_RAY_CACHE."
    )

    @model_validator(mode="after")
    def _used(self) -> "Recipe":
        if self.resources.on_broken_task == "evict" and not self.can_evict:
            raise ValueError("resources.on_broken_task: this job cannot go on without a task")
        if self.resources.grams != "full" and not self.can_gather:
            raise ValueError("resources.grams: this job gathers no Gram statistics. Leave it out")
        return self

    @property
    def output_path(self) -> str:
        """The recipe's output folder as written, relative to the storage root."""
        output = getattr(self, "output")  # noqa: B009 - declared by the subclasses
        return output.path if isinstance(output, Output) else output
