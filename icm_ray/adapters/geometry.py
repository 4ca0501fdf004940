"""How adapters lie to each other, from their files alone and one module at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from icm_ray.adapters.peft_format import AdapterFile
from icm_ray.linalg import lowrank
from icm_ray.types import LoRAFactors

SIGN_ROWS = 8
"""Rows of each module whose entries' signs are compared, evenly spaced."""
NO_DIRECTION = 1e-10
"""Share of a Gram's largest eigenvalue below which a direction is rounding."""
NO_SIZE = 1e-30


@dataclass(frozen=True)
class Geometry:
    """What can be known of adapters together without a base and without data.

    Attributes:
        cosines: Of the angle between each two whole deltas, by name; 0 where a module is missing.
        norms: Frobenius norm of each delta.
        rows: How far the row spaces of each two, what they read, coincide: the mean squared cosine
            of their principal angles over all modules that both have, in [0, 1]; None for one
            adapter. Random spaces of rank r have r / d_in.
        columns: The same of their column spaces, what they write.
        used_rank: By name, the share of its rank that an adapter uses: the participation ratio of
            its squared singular values over its rank, mean over modules, in (0, 1].
        outvoted: Share of the size of all entries, tasks added up, whose sign is that of the
            smaller side of its entry, in [0, .5]; over some rows of each module.
        outvoted_by_chance: The same with every entry's sign drawn anew.
    """

    cosines: Mapping[str, Mapping[str, float]]
    norms: Mapping[str, float]
    rows: float | None
    columns: float | None
    used_rank: Mapping[str, float]
    outvoted: float
    outvoted_by_chance: float


def geometry_of(files: Sequence[AdapterFile]) -> Geometry:
    """Return how adapters lie to each other.

    Cost: reads every file once; holds one module of all of them; O(R^2 (d_in + d_out)) a module.
    """
    names = [file.name for file in files]
    products = {a: dict.fromkeys(names, 0.0) for a in names}
    overlaps: dict[str, list[float]] = {"rows": [], "columns": []}
    used: dict[str, list[float]] = {name: [] for name in names}
    sides = Sides()
    for module in sorted({m for file in files for m in file.shapes}):
        held = {file.name: file.factors(module) for file in files if module in file.shapes}
        for name, f in held.items():
            for other, g in held.items():
                products[name][other] += lowrank.inner(f.b, f.a, g.b, g.a)
        sides.add(list(held.values()))
        a = {name: one.a.double().T for name, one in held.items()}
        b = {name: one.b.double() for name, one in held.items()}
        for kind, spaces in (("rows", a), ("columns", b)):
            own = {name: _orthonormal(side) for name, side in spaces.items()}
            overlaps[kind] += [
                float((own[x].T @ own[y]).square().sum()) / min(own[x].shape[1], own[y].shape[1])
                for x, y in combinations(own, 2)
                if own[x].shape[1] and own[y].shape[1]
            ]
        for name in held:
            squares = (a[name].T @ a[name]) @ (b[name].T @ b[name])  # whose eigenvalues are s^2
            if (fourth := float((squares * squares.T).sum())) > 0:
                used[name].append(float(squares.trace()) ** 2 / fourth / held[name].rank)
    return Geometry(
        _cosines(products),
        {name: max(products[name][name], 0.0) ** 0.5 for name in names},
        _mean(overlaps["rows"]),
        _mean(overlaps["columns"]),
        {name: _mean(shares) or 0.0 for name, shares in used.items()},
        sides.smaller / max(sides.all, NO_SIZE),
        sides.smaller_by_chance / max(sides.all, NO_SIZE),
    )


@dataclass
class Sides:
    """Sizes of entries, added up: all of them, and those that an election by size outvotes."""

    all: float = 0.0
    smaller: float = 0.0
    smaller_by_chance: float = 0.0

    def add(self, factors: Sequence[LoRAFactors]) -> None:
        """Add some rows of a module's deltas; the draws depend on its shape alone."""
        step = max(factors[0].shape[0] // SIGN_ROWS, 1)
        entries = torch.stack([one.b[::step] @ one.a for one in factors])
        draw = torch.Generator().manual_seed(entries.numel())
        signs = torch.randint(0, 2, entries.shape, generator=draw, dtype=torch.int8) * 2 - 1
        sizes = entries.abs()
        whole = sizes.sum(0)
        self.all += float(whole.sum())
        self.smaller += float((whole - entries.sum(0).abs()).sum()) / 2
        self.smaller_by_chance += float((whole - (sizes * signs).sum(0).abs()).sum()) / 2


def _orthonormal(side: Tensor) -> Tensor:
    """Return an orthonormal basis of the columns of `(d, rank)`, `(d, independent ones)`."""
    values, vectors = torch.linalg.eigh(side.T @ side)
    kept = values > NO_DIRECTION * values[-1:].clamp_min(0)
    return side @ (vectors[:, kept] / values[kept].sqrt())


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def delta_cosines(files: Sequence[AdapterFile]) -> dict[str, Mapping[str, float]]:
    """Return the cosine of the angle between each two adapters' whole deltas, by name.

    A module that one of them lacks is a zero there.
    """
    return dict(geometry_of(files).cosines)


def _cosines(products: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    return {
        a: {b: products[a][b] / max((products[a][a] * products[b][b]) ** 0.5, 1e-30) for b in row}
        for a, row in products.items()
    }


SHORT, ALIKE, AGAINST = 1 / 3, 0.9, -0.1
"""A norm over the longest, and cosines that are worth a word."""
TOGETHER, APART = 0.5, 0.2
"""Overlaps of spaces that are worth a word."""
AGREED = 0.1
"""Share of what chance outvotes, above or below it, that is worth another word."""


def readings(found: Geometry) -> list[str]:
    """Return what a geometry says to whoever chooses a method, one line each; docs/choosing.md."""
    if found.rows is None or found.columns is None:
        return []
    lines = []
    if found.rows >= TOGETHER:
        lines.append(
            f"row spaces: overlap {found.rows:.2f}: they read alike, as adapters of one "
            "initialisation do, and differ in what they write. linear is nearly K times soup "
            "here, and wudi, which inverts what they read, is undone."
        )
    elif found.rows <= APART:
        lines.append(
            f"row spaces: overlap {found.rows:.2f}: they read apart, as adapters of own "
            "initialisations do. linear, which adds A and B by themselves, is half cross terms."
        )
    if found.columns >= TOGETHER:
        lines.append(
            f"column spaces: overlap {found.columns:.2f}: they write into the same directions, "
            "where sums collide."
        )
    longest = max(found.norms.values())
    for name, norm in found.norms.items():
        if norm < SHORT * longest:
            lines.append(
                f"{name}: norm {norm:.3g} beside {longest:.3g}: it drowns in averages and sums. "
                "Give it a larger weight, or use iso_c."
            )
    for a, b in combinations(found.cosines, 2):
        cosine = found.cosines[a][b]
        if cosine >= ALIKE:
            lines.append(f"{a} and {b}: cosine {cosine:.2f}: nearly the same adapter twice.")
        if cosine <= AGAINST:
            lines.append(f"{a} and {b}: cosine {cosine:.2f}: sums undo part of both.")
    agree = 1 - found.outvoted / max(found.outvoted_by_chance, NO_SIZE)
    lines.append(
        f"signs: {found.outvoted:.0%} of the entries' size is outvoted, "
        f"{found.outvoted_by_chance:.0%} would be by chance: "
        + (
            "they agree, so an election (ties) has little to mend and averages keep their size."
            if agree >= AGREED
            else "they pull single weights apart, where ties and its like elect."
            if agree <= -AGREED
            else "as good as unrelated, so an election (ties) decides little better than a coin."
        )
    )
    lines.append(
        "Which tasks share their inputs, and so pay in regmean, files do not tell: jobs.evidence "
        "kind=gram_statistics does."
    )
    return lines
