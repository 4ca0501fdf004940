"""How far tasks' inputs coincide, by their Gram statistics: what one linear map is asked twice."""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import median

from icm_ray.evidence.tensors import Evidence
from icm_ray.linalg.gram import GRAM_KINDS, Gram

Overlap = Mapping[str, Mapping[str, float]]
"""Cosine by task and task."""

MOST_TASKS = 64
"""Beyond, no overlap is measured."""
MOST_INPUTS = 64
"""Distinct module inputs that are looked at, evenly spaced where there are more."""
MOST_BYTES = 2e10
"""Of Grams that are read: large ones are looked at in fewer inputs, at least one."""
DIGITS = 4
"""More would depend on the order in which threads add up."""

SHARED = 0.6
"""A cosine that is worth a word, if it is also this much above that of any two tasks here:"""
ABOVE = 0.15


def input_overlap(evidence: Evidence, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the cosine of each two tasks' Grams, `tr(G_i G_j) / (|G_i| |G_j|)`, mean over modules.

    1 for inputs of the same second moments, 0 for inputs without a common direction. It depends on
    the base: where a few features are much larger than all others, any two tasks are near 1.

    Args:
        evidence: Gram statistics of any form.
        tasks: Whose; for fewer than two or more than 64 nothing is measured.

    Cost: reads each Gram once for every other task, two in memory at a time, up to `MOST_BYTES`.
    """
    if not 1 < len(tasks) <= MOST_TASKS:
        return {}
    tasks = sorted(tasks)
    sums = {task: dict.fromkeys(tasks, 0.0) for task in tasks}
    seen = {task: dict.fromkeys(tasks, 0) for task in tasks}
    read = 0.0
    for module, count in _inputs(evidence, tasks):
        if read > MOST_BYTES:
            break
        squares = {}
        for place, task in enumerate(tasks):
            if (mine := _gram(evidence, module, task)) is None:
                continue
            squares[task] = mine.inner(mine)
            read += (place + 1) * sum(tensor.nbytes for tensor in mine.tensors().values())
            for other in tasks[:place]:
                yours = _gram(evidence, module, other) if squares.get(other) else None
                if yours is None or not squares[task]:
                    continue
                cosine = mine.inner(yours) / math.sqrt(squares[task] * squares[other])
                for a, b in ((task, other), (other, task)):
                    sums[a][b] += count * cosine
                    seen[a][b] += count
    return {
        a: {b: 1.0 if a == b else round(sums[a][b] / max(seen[a][b], 1), DIGITS) for b in tasks}
        for a in tasks
    }


def overlap_lines(overlap: Overlap) -> list[str]:
    """Return which tasks share their inputs, in words, and what that means; docs/choosing.md."""
    pairs = {(a, b): overlap[a][b] for a, b in combinations(overlap, 2)}
    if not pairs:
        return []
    if len(pairs) == 1:  # nothing to compare it with
        [((a, b), one)] = pairs.items()
        return [f"inputs: {a} and {b} share theirs to {one:.2f}, of 1 for the same inputs."]
    usual = median(pairs.values())
    close = {pair: c for pair, c in pairs.items() if c >= max(SHARED, usual + ABOVE)}
    if not close:
        (a, b), most = max(pairs.items(), key=lambda item: item[1])
        return [
            f"inputs: no two tasks share theirs more than any two do (median {usual:.2f}; at most "
            f"{most:.2f}, {a} and {b})."
        ]
    lines = []
    while close:
        [(task, _)] = Counter(name for pair in close for name in pair).most_common(1)
        own = {b if a == task else a: c for (a, b), c in close.items() if task in (a, b)}
        close = {pair: c for pair, c in close.items() if task not in pair}
        shown = [f"{name} ({c:.2f})" for name, c in sorted(own.items(), key=lambda i: -i[1])]
        lines.append(f"inputs: {task} shares its own with {_and(shown)}; any two: {usual:.2f}.")
    return [
        *lines,
        "One linear map answers tasks that share inputs, so what averages in the metric of inputs "
        "(regmean, esm, output.metric: inputs) gives the mean of their adapters where they differ.",
    ]


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _inputs(evidence: Evidence, tasks: Sequence[str]) -> list[tuple[str, int]]:
    """Return a module of each distinct input, and how many modules read it, in a mixed order."""
    ends = tuple(f".{kind}.{task}" for kind in GRAM_KINDS for task in tasks)
    found = {n.removesuffix(end) for n in evidence.names for end in ends if n.endswith(end)}
    found |= {module for task in tasks for module in evidence.shared.get(task, {})}
    alike: dict[tuple[str, ...], list[str]] = {}
    for module in sorted(found):
        owners = tuple(evidence.shared.get(task, {}).get(module, module) for task in tasks)
        alike.setdefault(owners, []).append(module)
    groups = [(modules[0], len(modules)) for modules in alike.values()]
    kept = min(len(groups), MOST_INPUTS)
    spread = [groups[i * len(groups) // kept] for i in range(kept)]
    random.Random(0).shuffle(spread)  # so that an early end has seen every depth
    return spread


def _gram(evidence: Evidence, module: str, task: str) -> Gram | None:
    kinds = [f"{kind}.<task>" for kind in GRAM_KINDS]
    stored = evidence.of(module, kinds, [task])
    if not stored:
        return None
    parts = {kind.removesuffix(f".{task}"): tensor for kind, tensor in stored.items()}
    like = next(iter(parts.values()))
    packed = "gram" in parts and like.ndim == 1
    d_in = (math.isqrt(8 * len(like) + 1) - 1) // 2 if packed else like.shape[-1]
    return Gram.of(d_in, **parts)
