"""The values that flow through the project. Frozen, plain, and free of Ray and transformers.

Axis names in annotations: `rank`, `d_in`, `d_out`, `tasks`, `d_model`, `tokens`.

Two words that other projects mix up:
    delta        the weight change of one module, `(d_out, d_in)`.
    task vector  the hidden-state difference of ICM-Fusion Eq. 1, `(d_model,)`.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from icm_ray.errors import InputError
from icm_ray.kinds import CutMetric

RankPolicy = int | str | None
"""An int, "exact", "energy:0.99", "serving:64", "total:400" over all modules, or None for the
method's own default."""


@dataclass(frozen=True)
class LoRAFactors:
    """One module's low-rank change `b @ a`, with the adapter's scaling already inside `b`.

    Attributes:
        a: Down-projection, `(rank, d_in)`, float32.
        b: Up-projection times scaling, `(d_out, rank)`, float32.
        scaling: The number that was folded into `b` (alpha / rank, or alpha / sqrt(rank)). Only
            factor-wise methods such as `linear`, which need the raw factors, may look at it.
    """

    a: Float[Tensor, "rank d_in"]
    b: Float[Tensor, "d_out rank"]
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.b.shape[1] != self.a.shape[0]:
            raise InputError(
                f"factors: a is {tuple(self.a.shape)} and b is {tuple(self.b.shape)} but "
                "(rank, d_in) and (d_out, rank) are expected. Check the adapter's tensors."
            )

    @classmethod
    def none(cls, shape: tuple[int, int]) -> "LoRAFactors":
        """Return the change of rank 0 of a module of shape `(d_out, d_in)`."""
        return cls(torch.zeros(0, shape[1]), torch.zeros(shape[0], 0))

    @property
    def rank(self) -> int:
        """Number of rank-one terms, zero or more."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape `(d_out, d_in)` of the delta."""
        return self.b.shape[0], self.a.shape[1]

    def delta(self) -> Float[Tensor, "d_out d_in"]:
        """Return the dense weight change `b @ a` in float32. Cost: d_out * d_in floats."""
        return self.b.float() @ self.a.float()


@dataclass(frozen=True)
class Delta:
    """A dense weight change that is made block by block, so that it is never held K times.

    Attributes:
        shape: `(d_out, d_in)`.
        blocks: Starts a pass: yields blocks of consecutive rows from top to bottom, float32, each
            `(rows, d_in)`. Every pass gives the same bytes. A block is the caller's until the next
            one is asked for; its memory may be used again then.
    """

    shape: tuple[int, int]
    blocks: Callable[[], Iterator[Tensor]]

    @classmethod
    def of(cls, dense: Float[Tensor, "d_out d_in"]) -> "Delta":
        """Return a matrix that is in memory already as a Delta of one block."""
        return cls((dense.shape[0], dense.shape[1]), lambda: iter((dense,)))

    def dense(self) -> Float[Tensor, "d_out d_in"]:
        """Return the whole matrix. Cost: d_out * d_in floats, once."""
        out = torch.empty(self.shape)
        row = 0
        for block in self.blocks():
            out[row : row + block.shape[0]] = block
            row += block.shape[0]
        return out


@dataclass(frozen=True)
class PerTask:
    """One module's result of a method that makes an adapter for each task besides the common one.

    Attributes:
        unified: The one change that stands for all tasks.
        tasks: The change of each task that has the module.
    """

    unified: "LoRAFactors | Delta"
    tasks: Mapping[str, "LoRAFactors | Delta"]


ModuleEvidence = Mapping[str, Tensor]
"""What evidence tells one module: tensors by kind, or by `<kind>.<task>` such as "gram.law"."""


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter of one base model.

    Attributes:
        name: The task's name; every order in this project is the order of these names.
        base_model: What `adapter_config.json` calls its base, or None.
        modules: Factors by the module's path in the base model, sorted by path.
        config: The adapter's PEFT config as plain data.
        fingerprint: sha256 over paths, shapes and float32 factors; equal means equal deltas.
        dtype: Element type the file was stored in, written back on save.
        layouts: Modules that are no plain linear layer: "embedding", "conv:<k>x<k>", or
            "expert:<e>/<experts>" inside of one parameter.
        saved_modules: Full tensors that PEFT's `modules_to_save` trained, if kept.
    """

    name: str
    base_model: str | None
    modules: Mapping[str, LoRAFactors]
    config: Mapping[str, Any]
    fingerprint: str
    dtype: torch.dtype = torch.float32
    layouts: Mapping[str, str] = field(default_factory=dict)
    saved_modules: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("modules", "layouts", "saved_modules"):
            in_order = dict(sorted(getattr(self, name).items()))
            object.__setattr__(self, name, MappingProxyType(in_order))

    def __reduce__(self) -> tuple[Any, ...]:  # a MappingProxyType alone cannot be pickled
        fields = (dict(self.modules), dict(self.config), self.fingerprint, self.dtype)
        extra = (dict(self.layouts), dict(self.saved_modules))
        return Adapter, (self.name, self.base_model, *fields, *extra)

    @property
    def max_rank(self) -> int:
        """Largest rank of any module."""
        return max((factors.rank for factors in self.modules.values()), default=0)


@dataclass(frozen=True)
class ModuleContext:
    """What a module-scope method may know besides the factors it is given.

    Attributes:
        module: Path of the module being merged.
        tasks: Names of the adapters that have this module, in the order of the factors.
        all_tasks: Names of every adapter of the merge, sorted.
        seed: Seed of the whole merge; draw with `seeding.generator(seed, task, module)`.
        statistics: What the row's passes over all modules concluded; see `table.Pass`.
    """

    module: str
    tasks: tuple[str, ...]
    all_tasks: tuple[str, ...]
    seed: int = 0
    statistics: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def rows(self) -> list[int]:
        """Positions of the present tasks among all tasks: rows of per-task statistics."""
        return [self.all_tasks.index(task) for task in self.tasks]


CutRoute = Literal["none", "exact", "randomised"]
"""How a module was cut: not at all, by an exact SVD, or by a randomised one (energy measured)."""


@dataclass(frozen=True)
class ModuleReport:
    """What happened to one module.

    Attributes:
        rank: Rank written out.
        exact_rank: Rank the result had before the final cut; its shorter side where a randomised
            cut saw the largest singular values only.
        input_norms: Frobenius norm of each present task's delta.
        output_norm: Frobenius norm of the merged delta as written.
        retained_energy: Share of the squared Frobenius norm that the final cut kept, in [0, 1].
        truncation_error: Relative Frobenius error of the final cut, sqrt(1 - retained_energy).
        absent: Tasks without this module; their delta counts as zero.
        cut: How the rank was reached.
        task_energy: For methods with an adapter for each task: what the cut kept of each one's.
        seen_energy: Share of what the result adds to the module's outputs, squared over the inputs
            behind the Gram statistics, that the cut kept, in [0, 1]; None without any, or if
            nothing was cut.
    """

    rank: int
    exact_rank: int
    input_norms: Mapping[str, float]
    output_norm: float
    retained_energy: float
    truncation_error: float
    absent: tuple[str, ...] = ()
    cut: CutRoute = "none"
    task_energy: Mapping[str, float] = field(default_factory=dict)
    seen_energy: float | None = None


@dataclass(frozen=True)
class MergeReport:
    """The provenance of one merge: everything needed to repeat and to judge it.

    Attributes:
        method: Name in METHODS.
        formula: The result in one line.
        params: Every parameter, defaults included.
        seed: Seed of the merge.
        output_rank: The rank policy as given.
        output_metric: What a cut kept most of.
        inputs: Fingerprint of each adapter by name.
        modules: What happened to each module.
        evidence: sha256 of what the method was told of models and data, or None.
        per_task: For methods with an adapter for each task: the share of the squared norm of each
            one's change that the final cut kept.
    """

    method: str
    formula: str
    params: Mapping[str, Any]
    seed: int
    output_rank: RankPolicy
    inputs: Mapping[str, str]
    modules: Mapping[str, ModuleReport]
    evidence: str | None = None
    per_task: Mapping[str, float] = field(default_factory=dict)
    output_metric: CutMetric = "weights"

    @property
    def seen_energy(self) -> float | None:
        """Mean over modules of what inputs see of them after the cut; None if nothing is known."""
        shares = [m.seen_energy for m in self.modules.values() if m.seen_energy is not None]
        return sum(shares) / len(shares) if shares else None

    @property
    def retained_energy(self) -> float:
        """Share of the whole merged delta's squared norm that the final cut kept."""
        kept = sum(m.output_norm**2 for m in self.modules.values())
        before = sum(
            m.output_norm**2 / m.retained_energy if m.retained_energy else 0.0
            for m in self.modules.values()
        )
        return kept / before if before else 1.0


@dataclass(frozen=True)
class MergeResult:
    """A merged adapter, the per-task adapters of methods that make them, and the report."""

    adapter: Adapter
    per_task: Mapping[str, Adapter]
    report: MergeReport


@dataclass(frozen=True)
class TaskVectors:
    """Task vectors of K adapters.

    Paper: ICM-Fusion, arXiv 2508.04153, Eq. 1: mean-pooled last hidden state of the fine-tuned
    model minus the base's, averaged over the same unlabelled inputs of the task.

    Attributes:
        vectors: `(d_model,)` float32 by task.
        adapters: Fingerprint of the adapter each vector came from.
    """

    vectors: Mapping[str, Float[Tensor, " d_model"]]
    adapters: Mapping[str, str]


@dataclass(frozen=True)
class NullSpaceRatios:
    """Mean null-space ratio of each adapter's inputs, per module, in [0, 1].

    Paper: NSC, arXiv 2603.26317, Eq. 1: 0 if the module's inputs lie in the row space of its A,
    `sqrt(1 - rank / d_in)` for inputs that have nothing to do with it.

    Attributes:
        expert: `{task: {module: ratio}}` with inputs produced by the task's own fine-tuned model.
        base: The same A, with inputs produced by the base model. The gap is what merging can move.
        adapters: Fingerprint of the adapter each row came from.
    """

    expert: Mapping[str, Mapping[str, float]]
    base: Mapping[str, Mapping[str, float]]
    adapters: Mapping[str, str]
