"""What is learned: numbers between fixed low-rank factors, so that the result is a LoRA exactly.

Every parametrisation says the same of a module: `delta = left @ core @ right + residual`, where
only the small core depends on what is learned.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from icm_ray.adapters.blocks import block_path
from icm_ray.evidence.rebuild import bases, positions, stacks
from icm_ray.learning.terms import Terms
from icm_ray.seeding import generator
from icm_ray.types import LoRAFactors

Sharing = Literal["module", "block", "adapter"]
Link = Literal["raw", "clamp", "softplus", "sigmoid"]


@dataclass(frozen=True)
class Frame:
    """The constants around one module's core.

    Attributes:
        left: `(d_out, p)`.
        right: `(q, d_in)`.
        residual: Added as it is, or None.
        layout: "linear" or "embedding".
    """

    left: Float[Tensor, "d_out p"]
    right: Float[Tensor, "q d_in"]
    residual: LoRAFactors | None = None
    layout: str = "linear"


@runtime_checkable
class Parameters(Protocol):
    """What the learner asks of a parametrisation; a decoder of latents can be one too."""

    @property
    def terms(self) -> Terms:
        """What is combined."""
        ...

    @property
    def frames(self) -> Mapping[str, Frame]:
        """The constants around each module's core."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return the leaves that are learned, by name; the same objects every time."""
        ...

    def cores(self) -> dict[str, Tensor]:
        """Return each module's core as a function of the leaves: `(p, q)`, or a diagonal `(q,)`."""
        ...

    def learned(self) -> dict[str, Tensor]:
        """Return what has to be stored, `<module>.<kind>`, so that `rebuild` gives the merge."""
        ...


def fixed_tensors(terms: Terms) -> dict[str, Tensor]:
    """Return the terms and the residual as tensors to store, if the adapters do not hold them."""
    stored = {}
    for module, given in terms.modules.items():
        if not terms.own:
            for task, term in given.items():
                stored[f"{module}.a.{task}"] = term.a.contiguous()
                stored[f"{module}.b.{task}"] = term.b.contiguous()
        if module in terms.residual:
            stored[f"{module}.residual_a"] = terms.residual[module].a.contiguous()
            stored[f"{module}.residual_b"] = terms.residual[module].b.contiguous()
    return stored


class Coefficients:
    """One number per task and module, or finer, or shared by several modules.

    Paper: `sum_k c_k^l delta_k^l` of AdaMerging (arXiv 2310.02575, layer-wise), aTLAS (arXiv
    2407.02880) and NSC (arXiv 2603.26317).
    Differs: aTLAS also partitions a weight by random dense masks; here a partition is of the
    term's ranks, because only that keeps the result a LoRA.
    """

    def __init__(
        self,
        terms: Terms,
        start: float,
        *,
        sharing: Sharing = "module",
        groups: int | Literal["rank"] = 1,
        link: Link = "raw",
    ) -> None:
        """Make the coefficients, all equal to `start`.

        Args:
            terms: What they multiply.
            start: Every coefficient's start value.
            sharing: Modules that share their coefficients: none, those of a block, or all.
            groups: Runs of ranks with a coefficient of their own; "rank" gives each rank one.
            link: How a leaf becomes a coefficient. "clamp" cuts to [0, 1] with zero gradient
                outside, "softplus" keeps it positive, "sigmoid" in (0, 1).
        """
        self.terms = terms
        self.link: Link = link
        self.keys = {module: _key(module, sharing) for module in terms.modules}
        sizes = dict.fromkeys(self.keys.values(), 1)
        for module, terms_of in terms.modules.items():
            ranks = max(term.rank for term in terms_of.values())
            wanted = max(ranks, 1) if groups == "rank" else groups
            sizes[self.keys[module]] = max(sizes[self.keys[module]], wanted)
        leaf = _unlinked(start, link)
        self.leaves = {
            key: torch.full((len(terms.tasks), size), leaf).requires_grad_()
            for key, size in sorted(sizes.items())
        }
        self.positions = {
            module: positions(terms_of, terms.tasks, sizes[self.keys[module]])
            for module, terms_of in terms.modules.items()
        }
        self.frames = {
            module: Frame(
                *stacks(terms_of), terms.residual.get(module), terms.layouts.get(module, "linear")
            )
            for module, terms_of in terms.modules.items()
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return one `(tasks, blocks)` leaf per set of modules that share."""
        return self.leaves

    def values(self) -> dict[str, Float[Tensor, "tasks blocks"]]:
        """Return the coefficients that the leaves stand for, by module."""
        linked = {key: _linked(leaf, self.link) for key, leaf in self.leaves.items()}
        return {module: linked[key] for module, key in self.keys.items()}

    def cores(self) -> dict[str, Tensor]:
        """Return the coefficient of each rank of each module's stack, `(q,)`."""
        values = self.values()
        return {module: values[module][self.positions[module]] for module in self.frames}

    def learned(self) -> dict[str, Tensor]:
        """Return `<module>.coefficients` `(tasks, blocks)`, and terms if not the adapters' own."""
        values = {f"{m}.coefficients": v.detach().clone() for m, v in self.values().items()}
        return {**values, **fixed_tensors(self.terms)}


class CoreMatrices:
    """A free matrix per module between shared orthonormal bases of all terms.

    The leaf is the change from the start, in units in which a leaf of ones has the Frobenius norm
    of a typical term: one learning rate then fits modules and suites of any scale, and weight
    decay pulls towards the start.
    """

    def __init__(self, terms: Terms, start: float, *, extend: bool = False) -> None:
        """Make the cores of `start` times the sum of the terms.

        Args:
            terms: What the bases span.
            start: Multiplies the sum of the terms; 0 leaves the residual alone.
            extend: Let the bases span the residual's row and column space too.
        """
        self.terms = terms
        self.frames, self.starts, self.units = {}, {}, {}
        for module, terms_of in terms.modules.items():
            residual = terms.residual.get(module)
            left, right = bases(terms_of, residual if extend else None)
            layout = terms.layouts.get(module, "linear")
            self.frames[module] = Frame(left, right, residual, layout)
            b, a = (stack.double() for stack in stacks(terms_of))
            core = start * (left.double().T @ b) @ (a @ right.double().T)
            self.starts[module] = core.float()
            squares = [float(((f.b.T @ f.b) * (f.a @ f.a.T)).sum()) for f in terms_of.values()]
            unit = (sum(squares) / len(squares)) ** 0.5 / max(*core.shape, 1)
            self.units[module] = unit
        self.leaves = {m: torch.zeros_like(c).requires_grad_() for m, c in self.starts.items()}

    def tensors(self) -> dict[str, Tensor]:
        """Return one `(p, q)` leaf per module."""
        return self.leaves

    def cores(self) -> dict[str, Tensor]:
        """Return each module's core `(p, q)`."""
        return {m: self.starts[m] + self.units[m] * leaf for m, leaf in self.leaves.items()}

    def learned(self) -> dict[str, Tensor]:
        """Return `<module>.core` `(p, q)`, and terms if not the adapters' own."""
        values = {f"{m}.core": core.detach().clone() for m, core in self.cores().items()}
        return {**values, **fixed_tensors(self.terms)}


class Factors:
    """A and B themselves, drawn as PEFT draws a new LoRA: A at random, B zero.

    Nothing of the adapters enters but their modules and ranks.
    """

    def __init__(self, terms: Terms, rank: int | Literal["largest", "sum"] = "largest") -> None:
        """Draw a LoRA for every module of the terms.

        Args:
            terms: Whose modules are adapted.
            rank: Of every module; "largest" or "sum" of the ranks that its terms have.
        """
        self.terms = terms
        self.leaves: dict[str, Tensor] = {}
        self.frames: dict[str, Frame] = {}
        for module, terms_of in terms.modules.items():
            ranks = [term.rank for term in terms_of.values()]
            own = {"largest": max(ranks), "sum": sum(ranks)}
            size = rank if isinstance(rank, int) else max(own[rank], 1)
            d_out, d_in = next(iter(terms_of.values())).shape
            draw = torch.rand(size, d_in, generator=generator("factors", module))
            a = ((2 * draw - 1) / d_in**0.5).requires_grad_()
            b = torch.zeros(d_out, size).requires_grad_()
            self.leaves |= {f"{module}.a": a, f"{module}.b": b}
            layout = terms.layouts.get(module, "linear")
            self.frames[module] = Frame(b, a, terms.residual.get(module), layout)

    def tensors(self) -> dict[str, Tensor]:
        """Return `<module>.a` `(rank, d_in)` and `<module>.b` `(d_out, rank)`."""
        return self.leaves

    def cores(self) -> dict[str, Tensor]:
        """Return ones: all that moves is in the frames."""
        return {m: frame.right.new_ones(len(frame.right)) for m, frame in self.frames.items()}

    def learned(self) -> dict[str, Tensor]:
        """Return A and B, and the residual's."""
        made = {name: leaf.detach().clone() for name, leaf in self.leaves.items()}
        return {**made, **fixed_tensors(self.terms)}


def _key(module: str, sharing: Sharing) -> str:
    if sharing == "module":
        return module
    return "adapter" if sharing == "adapter" else block_path(module) or module


def _linked(leaf: Tensor, link: Link) -> Tensor:
    if link == "clamp":
        return leaf.clamp(0.0, 1.0)
    if link == "softplus":
        return F.softplus(leaf)
    return leaf.sigmoid() if link == "sigmoid" else leaf


def _unlinked(value: float, link: Link) -> float:
    number = torch.tensor(value, dtype=torch.float64)
    if link == "softplus":
        return float(number.expm1().log())
    return float(number.logit()) if link == "sigmoid" else value
