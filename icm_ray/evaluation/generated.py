"""How near a generated answer is to the wanted one, in [0, 1]; words are separated by spaces."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

PAIR = re.compile(r"\ban? (\w+) (\w+)")
"""A thing in a caption: an article, and two words."""


def exact_match(said: str, wanted: str) -> float:
    """Return 1 if both hold the same words, else 0."""
    return float(said.split() == wanted.split())


def edit_match(said: str, wanted: str) -> float:
    """Return 1 - Levenshtein distance in words / words of the longer answer.

    For pronunciations a word is a phone: this is 1 - phone error rate, kept above 0.
    """
    a, b = said.split(), wanted.split()
    if not a and not b:
        return 1.0
    row = list(range(len(b) + 1))
    for i, word in enumerate(a, start=1):
        left, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, left + (word != other))
    return 1 - row[-1] / max(len(a), len(b))


def rouge_l(said: str, wanted: str) -> float:
    """Return ROUGE-L's F1: the longest common subsequence of words, case aside.

    Paper: Lin 2004, section 3, with beta 1; words are not stemmed.
    """
    a, b = said.lower().split(), wanted.lower().split()
    shared = _longest_common(a, b)
    return 2 * shared / (len(a) + len(b)) if shared else 0.0


def _longest_common(a: Sequence[str], b: Sequence[str]) -> int:
    row = [0] * (len(b) + 1)
    for word in a:
        left = 0
        for j, other in enumerate(b, start=1):
            left, row[j] = row[j], left + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def pair_f1(said: str, wanted: str) -> float:
    """Return the F1 of the pairs of words that name things: the two words after each "a".

    Of "a red ball and a blue box." these are (red, ball) and (blue, box), in any order; as SPICE
    (arXiv 1607.08822) compares what is said of a picture and leaves its wording aside.
    """
    a, b = (Counter(PAIR.findall(text.lower())) for text in (said, wanted))
    shared = (a & b).total()
    return 2 * shared / (a.total() + b.total()) if shared else 0.0


SCORERS: Mapping[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "edit_match": edit_match,
    "rouge_l": rouge_l,
    "pair_f1": pair_f1,
}
"""Scorers by metric: what was said, what was wanted."""
