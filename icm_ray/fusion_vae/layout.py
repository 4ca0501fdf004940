"""Adapters as vectors of one length, and back: what the Fusion-VAE reads and writes.

    layout = Layout.fit(spec, samples)
    x = layout.encode(adapter.modules)     # (D,), of mean square one over all samples
    layout.decode(x)                       # factors by module
    layout.error(adapter.modules, x)       # what got lost, relative, measured on deltas

The exact inverse of `encode` is `decode` wherever nothing was cut; what is cut (directions beyond
the finals' bases, principal components) is measured, never assumed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from icm_ray.config import RepresentationSpec
from icm_ray.errors import InputError
from icm_ray.fusion_vae.gauge import balanced, padded
from icm_ray.linalg import lowrank
from icm_ray.linalg.shared_basis import basis_of
from icm_ray.types import LoRAFactors

Modules = Mapping[str, LoRAFactors]


@dataclass(frozen=True)
class Sample:
    """One checkpoint of one task.

    Attributes:
        task: The task's name.
        step: Training step it was taken at.
        modules: Factors by module, scaling inside `b`.
        is_final: Whether it is the task's finished adapter.
    """

    task: str
    step: int
    modules: Modules
    is_final: bool = False


@dataclass(frozen=True)
class Part:
    """One module's share of a decoded adapter: `left @ core @ right`.

    Attributes:
        left: `(d_out, p)`.
        core: `(p, q)`, or a diagonal `(q,)`.
        right: `(q, d_in)`.
    """

    left: Float[Tensor, "d_out p"]
    core: Tensor
    right: Float[Tensor, "q d_in"]


@dataclass(frozen=True)
class ModuleLayout:
    """How one module's delta becomes numbers.

    Attributes:
        path: The module.
        shape: `(d_out, d_in)`.
        rank: Ranks of factors; 0 where numbers are a core between bases.
        units: What A and B are divided by; ones for a core.
        scale: What the coordinates are divided by, so that their mean square is one.
        left: `(d_out, p)`, orthonormal columns, for a core.
        right: `(q, d_in)`, orthonormal rows, for a core.
        directions: `(numbers, components)`, orthonormal columns, or None.
        kind: "linear" or "embedding".
    """

    path: str
    shape: tuple[int, int]
    rank: int
    units: tuple[float, float] = (1.0, 1.0)
    scale: float = 1.0
    left: Tensor | None = None
    right: Tensor | None = None
    directions: Tensor | None = None
    kind: str = "linear"

    @property
    def size(self) -> int:
        """How many numbers stand for the module."""
        return self.numbers if self.directions is None else self.directions.shape[1]

    @property
    def numbers(self) -> int:
        """How many numbers the gauge has, before any principal components."""
        if self.left is None or self.right is None:
            return self.rank * sum(self.shape)
        return self.left.shape[1] * self.right.shape[0]

    def flat(self, factors: LoRAFactors | None) -> Float[Tensor, " numbers"]:
        """Return the module's numbers in the gauge; None, a module not adapted, is zero."""
        if factors is None or factors.rank == 0:
            return torch.zeros(self.numbers)
        if self.left is not None and self.right is not None:
            b = self.left.T.double() @ factors.b.double()
            return (b @ (factors.a.double() @ self.right.T.double())).float().flatten()
        full = padded(factors, self.rank)
        return torch.cat([full.a.flatten() / self.units[0], full.b.flatten() / self.units[1]])

    def coordinates(self, flat: Float[Tensor, " numbers"]) -> Float[Tensor, " size"]:
        """Return what the network sees of the module's numbers."""
        kept = flat if self.directions is None else flat @ self.directions
        return kept / self.scale

    def part(self, coordinates: Float[Tensor, " size"]) -> Part:
        """Return the module's change; differentiable in the coordinates."""
        flat = coordinates * self.scale
        if self.directions is not None:
            flat = self.directions.to(flat) @ flat
        if self.left is not None and self.right is not None:
            core = flat.view(self.left.shape[1], self.right.shape[0])
            return Part(self.left.to(flat), core, self.right.to(flat))
        d_out, d_in = self.shape
        a = flat[: self.rank * d_in].view(self.rank, d_in) * self.units[0]
        b = flat[self.rank * d_in :].view(d_out, self.rank) * self.units[1]
        return Part(b, flat.new_ones(self.rank), a)


@dataclass(frozen=True)
class Layout:
    """How every module's delta becomes numbers, one module after the other.

    Attributes:
        gauge: How deltas are written; see `RepresentationSpec`.
        modules: Sorted by path.
    """

    gauge: str
    modules: tuple[ModuleLayout, ...]

    @classmethod
    def fit(
        cls,
        spec: RepresentationSpec,
        samples: Sequence[Sample],
        kinds: Mapping[str, str] | None = None,
    ) -> "Layout":
        """Make the bases, principal directions and units that samples of all tasks share.

        Bases come from the finals, so that those lose nothing; so do the first principal
        directions, and the best ones for what is left of the other checkpoints follow.

        Args:
            spec: Gauge and number of components.
            samples: Checkpoints and exactly one final of each task; ranks may differ.
            kinds: Modules that are no plain linear layer; see `types.Adapter.layouts`.

        Raises:
            InputError: no final is there, or a convolution is adapted.
        """
        kinds = kinds or {}
        convolution = next((p for p, kind in kinds.items() if kind.startswith("conv")), None)
        if convolution:
            raise InputError(
                f"module {convolution}: a convolution, which a Fusion-VAE cannot run. Leave it out."
            )
        finals = [sample for sample in samples if sample.is_final]
        if not finals:
            raise InputError("samples: no final adapter among them, but one a task is expected.")
        gauged = _gauged(spec.gauge, samples)
        paths = sorted({path for sample in finals for path in sample.modules})
        layout = []
        for path in paths:
            mine = [modules.get(path) for modules in gauged]
            ends = [f for f, s in zip(mine, samples, strict=True) if s.is_final and f is not None]
            one = _plain(spec.gauge, path, ends, mine, kinds.get(path, "linear"))
            layout.append(_fitted(one, mine, [s.is_final for s in samples], spec.components))
        return cls(spec.gauge, tuple(layout))

    @property
    def size(self) -> int:
        """D: length of the vectors."""
        return sum(self.sizes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Length of each module's share."""
        return tuple(module.size for module in self.modules)

    @property
    def kinds(self) -> dict[str, str]:
        """Modules that are no plain linear layer."""
        return {m.path: m.kind for m in self.modules if m.kind != "linear"}

    def encode(self, modules: Modules, like: Modules | None = None) -> Float[Tensor, " D"]:
        """Return an adapter as a vector.

        Args:
            modules: Factors by module; modules the layout does not know raise.
            like: The trajectory's final, which balanced checkpoints are aligned to.

        Raises:
            InputError: a module is unknown, of another shape or of too large a rank.
        """
        self._check(modules)
        final = _gauge(self.gauge, like) if like is not None else None
        gauged = _gauge(self.gauge, modules, final)
        return torch.cat([m.coordinates(m.flat(gauged.get(m.path))) for m in self.modules])

    def parts(self, x: Float[Tensor, " D"]) -> dict[str, Part]:
        """Return each module's change, differentiable in `x`."""
        shares = zip(self.modules, x.split(list(self.sizes)), strict=True)
        return {module.path: module.part(share) for module, share in shares}

    def decode(self, x: Float[Tensor, " D"]) -> dict[str, LoRAFactors]:
        """Return the adapter a vector stands for."""
        return {path: factors_of(part) for path, part in self.parts(x.detach().float()).items()}

    def error(self, modules: Modules, x: Float[Tensor, " D"]) -> float:
        """Return how far `decode(x)` is from an adapter, over the adapter's norm, on deltas."""
        return distance(modules, self.decode(x)) / max(norm(modules), 1e-30)

    def _check(self, modules: Modules) -> None:
        known = {module.path: module for module in self.modules}
        problems = []
        for path, factors in modules.items():
            if path not in known:
                problems.append(f"module {path}: not one the Fusion-VAE was trained on.")
            elif factors.shape != known[path].shape:
                problems.append(
                    f"module {path}: {factors.shape} but {known[path].shape} is expected."
                )
            elif self.gauge == "raw" and factors.rank > known[path].rank:
                problems.append(
                    f"module {path}: rank {factors.rank} but at most {known[path].rank} is "
                    "expected. Train with gauge core, which takes any rank."
                )
        if problems:
            raise InputError(problems)

    def tensors(self) -> dict[str, Tensor]:
        """Return bases and directions by name, to be saved."""
        tensors = {}
        for module in self.modules:
            for name in ("left", "right", "directions"):
                value = getattr(module, name)
                if value is not None:
                    tensors[f"{module.path}.{name}"] = value.contiguous()
        return tensors

    def described(self) -> dict[str, Any]:
        """Return everything else as plain data."""
        plain = [
            {
                "path": m.path,
                "shape": list(m.shape),
                "rank": m.rank,
                "units": list(m.units),
                "scale": m.scale,
                "kind": m.kind,
            }
            for m in self.modules
        ]
        return {"gauge": self.gauge, "modules": plain}

    @classmethod
    def restored(cls, described: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "Layout":
        """Return a layout from what `described` and `tensors` gave."""
        modules = [
            ModuleLayout(
                path=m["path"],
                shape=(m["shape"][0], m["shape"][1]),
                rank=m["rank"],
                units=(m["units"][0], m["units"][1]),
                scale=m["scale"],
                left=tensors.get(f"{m['path']}.left"),
                right=tensors.get(f"{m['path']}.right"),
                directions=tensors.get(f"{m['path']}.directions"),
                kind=m["kind"],
            )
            for m in described["modules"]
        ]
        return cls(described["gauge"], tuple(modules))


def factors_of(part: Part) -> LoRAFactors:
    """Return a part as factors; their rank is the shorter side of the core."""
    if part.core.ndim == 1:
        return LoRAFactors(part.right.contiguous(), (part.left * part.core).contiguous())
    if part.core.shape[0] < part.core.shape[1]:
        return LoRAFactors(part.core @ part.right, part.left.contiguous())
    return LoRAFactors(part.right.contiguous(), part.left @ part.core)


def norm(modules: Modules) -> float:
    """Return the Frobenius norm of all deltas together."""
    return sum(lowrank.norm(f.b, f.a) ** 2 for f in modules.values()) ** 0.5


def distance(one: Modules, two: Modules) -> float:
    """Return the Frobenius norm of the difference of all deltas; a missing module is zero."""
    total = 0.0
    for path in sorted({*one, *two}):
        pairs = [(m[path], sign) for m, sign in ((one, 1.0), (two, -1.0)) if path in m]
        b = torch.cat([sign * f.b for f, sign in pairs], 1)
        total += lowrank.norm(b, torch.cat([f.a for f, _ in pairs])) ** 2
    return total**0.5


def cosine(one: Modules, two: Modules) -> float:
    """Return the cosine of the angle between all deltas; 0 where one of them is zero."""
    inner = sum(
        float(
            (
                (one[p].b.double().T @ two[p].b.double())
                * (one[p].a.double() @ two[p].a.double().T)
            ).sum()
        )
        for p in sorted(one.keys() & two.keys())  # sums round by their order, and a set has none
    )
    lengths = norm(one) * norm(two)
    return inner / lengths if lengths else 0.0


def _gauge(gauge: str, modules: Modules, like: Modules | None = None) -> Modules:
    if gauge != "balanced":
        return modules
    return {p: balanced(f, (like or {}).get(p)) for p, f in modules.items()}


def _gauged(gauge: str, samples: Sequence[Sample]) -> list[Modules]:
    """Return every sample in the gauge, checkpoints aligned to their task's final."""
    finals = {s.task: _gauge(gauge, s.modules) for s in samples if s.is_final}
    return [
        finals[s.task] if s.is_final else _gauge(gauge, s.modules, finals.get(s.task))
        for s in samples
    ]


def _plain(
    gauge: str,
    path: str,
    finals: Sequence[LoRAFactors],
    every: Sequence[LoRAFactors | None],
    kind: str,
) -> ModuleLayout:
    """Return a module's layout without principal components."""
    shape = finals[0].shape
    if gauge == "core":
        left, right = (
            _orthonormal(torch.cat(side, 1))
            for side in ([f.b for f in finals], [f.a.T for f in finals])
        )
        return ModuleLayout(path, shape, 0, left=left, right=right.T.contiguous(), kind=kind)
    present = [f for f in every if f is not None and f.rank]
    rank = max((f.rank for f in present), default=0)
    sizes = [_mean_square(f.a for f in present) ** 0.5, _mean_square(f.b for f in present) ** 0.5]
    return ModuleLayout(path, shape, rank, (sizes[0] or 1.0, sizes[1] or 1.0), kind=kind)


def _orthonormal(stack: Tensor) -> Tensor:
    basis = basis_of(stack.float())
    return basis.product(torch.eye(basis.s.numel(), dtype=torch.float64)).contiguous()


def _mean_square(tensors: Iterable[Tensor]) -> float:
    squares = [float(t.double().square().mean()) for t in tensors]
    return sum(squares) / len(squares) if squares else 0.0


def _fitted(
    module: ModuleLayout,
    every: Sequence[LoRAFactors | None],
    is_final: Sequence[bool],
    components: int | None,
) -> ModuleLayout:
    """Return the layout with principal directions and the scale of its coordinates."""
    x = torch.stack([module.flat(f) for f in every])
    directions = None
    if components is not None and components < x.shape[1]:
        directions = _directions(x.double(), torch.tensor(is_final), components)
    kept = x if directions is None else x @ directions
    scale = float(kept.double().square().mean()) ** 0.5 if kept.numel() else 0.0
    return ModuleLayout(
        module.path,
        module.shape,
        module.rank,
        module.units,
        scale or 1.0,
        module.left,
        module.right,
        directions,
        module.kind,
    )


def _directions(x: Tensor, is_final: Tensor, components: int) -> Float[Tensor, "numbers c"]:
    """Return an orthonormal basis: the finals' span by size, then what is left by size.

    The finals' span is there even where it alone is wider than `components`.
    """
    floor = lowrank.NUMERICAL_RANK * float(x.norm())
    finals = x[is_final]
    first = _principal(finals, len(finals), floor)
    rest = x - (x @ first) @ first.T
    second = _principal(rest, max(components - first.shape[1], 0), floor)
    both, _ = torch.linalg.qr(torch.cat([first, second], 1))
    # QR may turn directions round; the signs carry no meaning but should not surprise.
    signs = (both * torch.cat([first, second], 1)).sum(0).sign()
    return (both * signs).float().contiguous()


def _principal(x: Tensor, count: int, floor: float) -> Tensor:
    _, s, vh = torch.linalg.svd(x, full_matrices=False)
    return vh[: min(count, int((s > floor).sum()))].T
