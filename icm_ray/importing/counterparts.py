"""Which of our methods does what a merge method of mergekit or a combination type of PEFT does."""

from dataclasses import dataclass
from typing import Literal

from icm_ray.errors import did_you_mean

DRAWS = (
    "Random masks are drawn anew: here they depend on seed, task and module alone, so that a merge "
    "can be repeated. The distribution is the same, the masks are others."
)
NO_LORA = (
    "The exact result is a dense matrix. It is cut to output.rank, by default the largest rank of "
    "an input; `rank: exact` loses nothing and is as large as the module."
)


@dataclass(frozen=True)
class Counterpart:
    """Our side of another tool's method.

    Attributes:
        method: A name in METHODS.
        preset: Its preset, if it has more than one convention.
        reads: Parameters besides weights that both sides know.
        differences: What differs, in sentences.
        normalizes: mergekit: whether weights are divided by their sum unless `normalize` says so.
        elects: mergekit: whether signs are elected, so that the sum of weights differs from entry
            to entry; "by weight" if our mean divides by the weights that agree, as mergekit's does,
            "by number" if it divides by how many agree.
        scaled: mergekit: whether it has a `lambda`.
        rescales: mergekit: whether dropped entries are made up for unless `rescale` says so.
        weighted: Whether weights are read at all.
    """

    method: str
    preset: str | None = None
    reads: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    normalizes: bool = False
    elects: Literal["by weight", "by number"] | None = None
    scaled: bool = True
    rescales: bool = False
    weighted: bool = True


_L1 = (
    "mergekit makes up for dropped entries by the L1 norm of what is left, which is 1 / density in "
    "the mean; here it is 1 / density exactly, as in the papers."
)
_GAMMA = (
    "With gamma 0, or too small for one entry of a module, mergekit 0.1 keeps nothing at all. Here "
    "it just leaves out none of the largest."
)
_EPSILON = (
    "epsilon is mergekit's times two: there it is half the range of the probabilities, here all of "
    "it, as in the paper."
)
_COSINE = (
    "A negative mean cosine counts as 0 here. mergekit lets the formula turn the average around."
)

COUNTERPARTS = {
    "linear": Counterpart("soup", normalizes=True, scaled=False),
    "task_arithmetic": Counterpart("task_arithmetic"),
    "ties": Counterpart(
        "ties", "mergekit", ("density",), (NO_LORA,), normalizes=True, elects="by weight"
    ),
    "dare_linear": Counterpart("dare", "dare", ("density",), (DRAWS, _L1, NO_LORA), rescales=True),
    "dare_ties": Counterpart(
        "dare_ties",
        "mergekit",
        ("density",),
        (DRAWS, _L1, NO_LORA),
        elects="by number",
        rescales=True,
    ),
    "breadcrumbs": Counterpart("breadcrumbs", None, ("density", "gamma"), (_GAMMA, NO_LORA)),
    "della": Counterpart(
        "della",
        None,
        ("density", "epsilon"),
        (_EPSILON, DRAWS, _L1, NO_LORA),
        normalizes=True,
        elects="by number",
        rescales=True,
    ),
    "model_stock": Counterpart("model_stock", differences=(_COSINE,), scaled=False, weighted=False),
}
"""Methods of mergekit 0.1 that have a counterpart."""

DEFAULTS = {"density": 1.0, "gamma": 0.01, "epsilon": 0.15}
"""mergekit's, for parameters a file leaves out."""

TIMES = {"epsilon": 2.0}
"""What mergekit's parameters are multiplied by."""

NEAREST = {
    "breadcrumbs_ties": "breadcrumbs",
    "della_linear": "della",
    "slerp": "linear",
    "nuslerp": "linear",
    "multislerp": "linear",
    "karcher": "linear",
    "nearswap": "linear",
    "sce": "ties",
    "arcee_fusion": "ties",
}
"""What to try instead of mergekit's other methods."""

_FACTORWISE = (
    "PEFT merges the A factors and, apart from them, the B factors, so that its result holds every "
    "B_i A_j and depends on how an adapter splits its change. Preset `peft` does the same, and the "
    "numbers agree; without it the method works on the weight changes, as its paper does."
)
_DENSE = (
    "PEFT holds the dense change of every adapter and decomposes their merge whole. Here the merge "
    "is made block by block and cut to the same rank, with the same residual."
)

COMBINATIONS = {
    "svd": Counterpart("svd"),
    "cat": Counterpart("cat"),
    "linear": Counterpart("linear", "peft", differences=(_FACTORWISE,)),
    "ties": Counterpart("ties", "peft", ("density",), (_FACTORWISE,)),
    "ties_svd": Counterpart("ties", "peft_svd", ("density",), (_DENSE,)),
    "dare_linear": Counterpart("dare", "peft", ("density",), (_FACTORWISE, DRAWS)),
    "dare_linear_svd": Counterpart("dare", "dare", ("density",), (_DENSE, DRAWS)),
    "dare_ties": Counterpart("dare_ties", "peft", ("density",), (_FACTORWISE, DRAWS)),
    "dare_ties_svd": Counterpart("dare_ties", "peft_svd", ("density",), (_DENSE, DRAWS)),
    "magnitude_prune": Counterpart("magnitude_prune", "peft", ("density",), (_FACTORWISE,)),
    "magnitude_prune_svd": Counterpart("magnitude_prune", None, ("density",), (_DENSE,)),
}
"""PEFT's combination types."""


def nearest(method: str) -> str:
    """Return advice for a merge method of mergekit that has no counterpart."""
    if method in NEAREST:
        return f" Try {NEAREST[method]!r}."
    return did_you_mean(method, COUNTERPARTS) or f" Known: {', '.join(COUNTERPARTS)}."
