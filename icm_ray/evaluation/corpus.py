"""Metrics of a whole corpus, sacrebleu's: what each answer counts, and the score of the sums."""

import importlib.util
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

from icm_ray.errors import RecipeError

CORPUS = ("bleu", "chrf")


@cache
def _metric(name: str) -> Any:
    if importlib.util.find_spec("sacrebleu") is None:
        raise RecipeError(
            f"metric: {name} but sacrebleu is not installed. Run pip install 'icm-ray[bleu]'."
        )
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return BLEU() if name == "bleu" else CHRF()


def counts_of(name: str, said: str, wanted: str) -> list[float]:
    """Return what one answer adds to the corpus's statistics."""
    (row,) = _metric(name)._extract_corpus_statistics([said], [[wanted]])
    return [float(number) for number in row]


def corpus_scores(name: str, counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the score of each weighted corpus, in [0, 1].

    Args:
        name: One of CORPUS.
        counts: `(examples, statistics)`.
        weights: `(corpora, examples)`, how often an example is in a corpus.
    """
    sums: Sequence[Sequence[float]] = (weights @ counts).tolist()
    metric = _metric(name)
    whole = ([round(number) for number in row] for row in sums)
    return np.array([metric._compute_score_from_stats(row).score / 100 for row in whole])
