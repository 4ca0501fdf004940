"""The one explicit last step: cut a merged module to the rank the user asked for."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Float
from torch import Tensor

from icm_ray.errors import RecipeError
from icm_ray.linalg import blockwise
from icm_ray.linalg.lowrank import rank_for_energy, svd
from icm_ray.types import (
    CutRoute,
    Delta,
    LoRAFactors,
    MergeReport,
    ModuleReport,
    RankPolicy,
)

SERVING_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks a serving engine can be started with (`--max-lora-rank` of vLLM)."""

NOTICED = 0.9
"""Share of the energy below which a cut is likely to be seen in scores."""


@dataclass(frozen=True)
class RankRule:
    """A parsed rank policy: what to do and its number.

    Attributes:
        kind: "exact", "at most" (a rank), "energy" (a share in (0, 1]), "total" (ranks of all
            modules together; see `budget`).
        number: The rank, the share or the sum; unused for "exact".
        tight: Drop ranks that hold nothing, even where the exact result already fits.
    """

    kind: Literal["exact", "at most", "energy", "total"]
    number: float = 0.0
    tight: bool = False

    @classmethod
    def parse(cls, policy: RankPolicy, default: str, largest_input: int) -> "RankRule":
        """Read a rank policy; see `types.RankPolicy`.

        Args:
            policy: The user's `output_rank`.
            default: What None means: "exact" or "largest input".
            largest_input: Largest rank of any adapter of the merge.

        Raises:
            RecipeError: the policy is none of the known forms or its number is out of range.
        """
        if policy is None:
            # Adapters that hold no rank at all merge to nothing, which any rank can hold.
            policy = "exact" if default == "exact" else max(largest_input, 1)
        if isinstance(policy, int) and not isinstance(policy, bool) and policy > 0:
            return cls("at most", policy)
        if policy == "exact":
            return cls("exact")
        kind, _, text = str(policy).partition(":")
        try:
            if kind == "energy" and 0 < float(text) <= 1:
                return cls("energy", float(text))
            if kind == "serving" and int(text) >= SERVING_RANKS[0]:
                largest = max(rank for rank in SERVING_RANKS if rank <= int(text))
                return cls("at most", largest, tight=True)
            if kind == "total" and int(text) > 0:
                return cls("total", int(text))
        except ValueError:
            pass
        raise RecipeError(
            f"output.rank: {policy!r} but a positive int, 'exact', 'energy:0.99', 'serving:64' or "
            "'total:400' is expected."
        )


@dataclass(frozen=True)
class Seen:
    """What a module's inputs see of the cut.

    Attributes:
        energy: Share that the cut kept; see `types.ModuleReport`.
        values: How much each rank holds, over the norm of the whole, descending, if it was cut for
            the inputs.
    """

    energy: float
    values: Float[Tensor, " rank"] | None = None


@dataclass(frozen=True)
class Cut:
    """A module after the cut; see `types.ModuleReport` for the fields."""

    factors: LoRAFactors
    exact_rank: int
    retained_energy: float
    route: CutRoute
    seen: Seen | None = None


def is_within(result: LoRAFactors | Delta, rule: RankRule) -> bool:
    """Say whether a result satisfies the rule as it is."""
    if isinstance(result, Delta) or rule.kind in ("energy", "total") or rule.tight:
        return False
    return result.rank <= (rule.number if rule.kind == "at most" else min(result.shape))


def cut(result: LoRAFactors | Delta, rule: RankRule) -> Cut:
    """Return `result` as factors of the rank `rule` asks for, with the energy that was kept.

    Factors that already satisfy the rule are returned untouched, so an exact merge stays exact.
    Of a total, as much as one module could get of it is kept, by descending singular value.
    """
    if isinstance(result, LoRAFactors):
        if is_within(result, rule):
            return Cut(result, result.rank, 1.0, "none")
        if min(result.shape) <= blockwise.EXACT_SIDE or not _is_wide(result):
            return _cut_factors(result, rule)
        result = _product(result)
    limit = int(rule.number) if rule.kind in ("at most", "total") else None
    found = blockwise.truncate(result.shape, result.blocks, lambda s: _rank(rule, s), limit)
    route: CutRoute = "exact" if found.is_exact else "randomised"
    return Cut(LoRAFactors(found.a, found.b), found.full_rank, found.retained_energy, route)


def _cut_factors(result: LoRAFactors, rule: RankRule) -> Cut:
    spectrum = svd(result.b, result.a)
    exact_rank = spectrum.s.numel()
    rank = min(_rank(rule, spectrum.s), exact_rank)
    b, a = spectrum.factors(rank)
    return Cut(LoRAFactors(a, b), exact_rank, spectrum.retained_energy(rank), "exact")


def _is_wide(factors: LoRAFactors) -> bool:
    d_out, d_in = factors.shape
    return factors.rank * (d_out + d_in) > d_out * d_in


def _product(factors: LoRAFactors) -> Delta:
    def blocks() -> Iterator[Tensor]:
        for start in range(0, factors.shape[0], blockwise.CHUNK):
            yield factors.b[start : start + blockwise.CHUNK] @ factors.a

    return Delta(factors.shape, blocks)


def loss_lines(report: MergeReport) -> list[str]:
    """Return a line that says how much a cut lost, if a user would notice."""
    if _noticed(report) >= NOTICED:
        return []
    shares = {module: _noticed(one) for module, one in report.modules.items()}
    worst = min(shares, key=lambda module: shares[module])
    of = "the energy" if report.seen_energy is None else "what inputs see"
    return [
        f"output.rank: {report.output_rank or 'left out'}: the cut kept {_noticed(report):.0%} of "
        f"{of}, {shares[worst]:.0%} in {worst}. Raise it, or compare scores with an uncut merge."
    ]


def _noticed(one: MergeReport | ModuleReport) -> float:
    """Return the share that a cut kept: of what inputs see, where that is known."""
    return one.retained_energy if one.seen_energy is None else one.seen_energy


def kept_line(report: MergeReport) -> str:
    """Return what the cut kept, in words."""
    line = f"{report.retained_energy:.2%} of the energy kept"
    seen = report.seen_energy
    return line if seen is None else f"{line}, {seen:.2%} of what inputs see"


def serving_rank(ranks: list[int]) -> int:
    """Return the smallest rank a server must be started with to load all of `ranks`."""
    return next(r for r in (*SERVING_RANKS, max(ranks, default=0)) if r >= max(ranks, default=0))


def _rank(rule: RankRule, s: Tensor) -> int:
    if rule.kind == "exact":
        return s.numel()
    return rank_for_energy(s, rule.number) if rule.kind == "energy" else int(rule.number)
