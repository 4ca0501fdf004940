"""Which of our methods is compared with which peer, on what, and what is asked of the result."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from icm_ray.benchmarks import peers
from icm_ray.benchmarks.peers import DENSITY, EvidenceTensors, Layers, Maker

PEFT, PEFT_FUNCTION, NAIVE = "PEFT", "PEFT's function", "naive"


def no_evidence(_layers: Layers, _rank: int) -> EvidenceTensors:
    """Say that neither side is told anything beyond the adapters."""
    return {}


@dataclass(frozen=True)
class Comparison:
    """One method of ours beside a peer, on the same adapters.

    Attributes:
        method: Ours.
        params: Its parameters; 1/K as everybody's weight is added where the peer is PEFT.
        peer: What the tables call the peer.
        make: Makes the peer's side.
        judged: What is said of results: distance to the float64 truth; distance to the peer's
            result; residual of the cut; or noise of random masks over what theory expects.
        result: "cut" to the recipe's rank, "whole" as the method gives it, or "dense": the method
            alone, written out as a matrix, without what a merge does around it.
        layers: Layers to compare on; None for all of the recipe.
        draws: Whether each side draws masks of its own: the peer's result is no cut of ours.
        evidence: Makes the named tensors that both sides are given.
        goal: What is asked of the ratio and of the result, and its number in the list of goals.
    """

    method: str
    params: Mapping[str, Any]
    peer: str
    make: Maker
    judged: Literal["truth", "peer", "residual", "noise"]
    result: Literal["cut", "whole", "dense"] = "whole"
    layers: tuple[str, ...] | None = None
    draws: bool = False
    evidence: Callable[[Layers, int], EvidenceTensors] = no_evidence
    goal: str = ""


def _peft(kind: str, method: str, preset: str | None = None, **fields: Any) -> Comparison:
    """Return a comparison with one of PEFT's combination types."""
    sparse = {"density": DENSITY} if kind not in ("cat", "svd", "linear") else {}
    params = {**sparse, **({"preset": preset} if preset else {})}
    fields = {"judged": "residual", **({"result": "cut"} if kind.endswith("svd") else {}), **fields}
    return Comparison(method, params, PEFT, partial(peers.peft_call, kind), **fields)


def _part(name: str, method: str, preset: str, **fields: Any) -> Comparison:
    """Return a comparison with one of PEFT's element-wise functions."""
    params = {"density": DENSITY, "preset": preset}
    make = partial(peers.peft_function, name)
    return Comparison(method, params, PEFT_FUNCTION, make, result="dense", **fields)


def _naive(method: str, merge: Callable[..., Any], **fields: Any) -> Comparison:
    """Return a comparison with a dense merge written from a paper's formulas."""
    fields = {"params": {}, "judged": "peer", **fields}
    return Comparison(method, peer=NAIVE, make=partial(peers.naive, merge), **fields)


_P6 = ">= 40x, residual within 1e-4 (P6)"
_V = ("v_proj",)

COMPARISONS: dict[str, Comparison] = {
    "cat": _peft("cat", "cat", judged="truth", goal=">= 10x (P8)"),
    "svd": _peft("svd", "svd", judged="truth", goal=">= 1000x, off truth <= 1e-6, < 50 MB (P1)"),
    "linear": _peft("linear", "linear", "peft", judged="peer"),
    "ties": _peft("ties", "ties", "peft", judged="peer"),
    "ties_svd": _peft("ties_svd", "ties", "peft_svd", goal=_P6),
    "dare_linear_svd": _peft("dare_linear_svd", "dare", "dare", draws=True, goal=_P6),
    "dare_ties_svd": _peft("dare_ties_svd", "dare_ties", "peft_svd", draws=True, goal=_P6),
    "magnitude_prune_svd": _peft("magnitude_prune_svd", "magnitude_prune"),
    "ties_dense": _part(
        "ties", "ties", "peft_svd", judged="peer", goal=">= 10x (torch: 3x), < 150 MB (P4)"
    ),
    "dare_dense": _part(
        "dare_linear", "dare", "dare", judged="noise", goal=">= 10x (torch: 3x) (P5)"
    ),
    "knots_ties": _naive(
        "knots_ties",
        peers.knots_ties,
        params={"density": DENSITY},
        layers=_V,
        goal=">= 80x, off peer <= 1e-6 (P2)",
    ),
    "knots_ties_q": _naive(
        "knots_ties",
        peers.knots_ties,
        params={"density": DENSITY},
        layers=("q_proj",),
        goal=">= 1500x, off peer <= 1e-6, < 300 MB (P3)",
    ),
    "core_space": _naive(
        "core_space",
        peers.core_space,
        params={"inner": "ties", "density": DENSITY},
        goal=">= 12x the authors' 0.66 s, off peer <= 1e-6 (P7)",
    ),
    "lora_lego": _naive(
        "lora_lego",
        peers.lora_lego,
        evidence=peers.first_units,
        goal=">= 100x, same clusters (P9)",
    ),
    "tsv": _naive("tsv", peers.tsv, layers=_V),
    "regmean": _naive(
        "regmean",
        peers.regmean,
        params={"rho": peers.RHO, "ridge": peers.RIDGE},
        evidence=peers.input_grams,
        layers=_V,
    ),
}
"""By name, as a recipe's `methods` lists them."""
