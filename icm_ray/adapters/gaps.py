"""Do an adapter's modules look like all the modules its config names? Asked without the base.

PEFT fills what a file lacks with zeros, and ignores what its config does not name, both without a
word. A list of plain names such as `q_proj` selects the same children in every layer, so one layer
that breaks the rule betrays a damaged file. Real architectures break it too, but never just once.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from itertools import pairwise, takewhile
from typing import Any

NARROWING = ("layers_to_transform", "layers_pattern", "exclude_modules")
"""Config keys that pick some layers on purpose."""


def plain_names(config: Mapping[str, Any]) -> list[str] | None:
    """Return `target_modules` if it is a list that names modules of every layer alike."""
    names = config.get("target_modules")
    narrowed = any(config.get(key) not in (None, "", []) for key in NARROWING)
    if not isinstance(names, list) or narrowed or any(re.search(r"\d", name) for name in names):
        return None
    return names


def covered(module: str, names: Collection[str]) -> bool:
    """Say whether PEFT's list rule selects `module`: equal to a name, or ending in `.name`."""
    return any(ending in names for ending in _endings(module))


def unused(names: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Return those of some names that select no module, in their order."""
    rest = dict.fromkeys(names)
    for module in modules:
        for ending in _endings(module):
            rest.pop(ending, None)
    return list(rest)


def _endings(module: str) -> Iterator[str]:
    """Yield what a name must be to select `module`; their number is that of its dots."""
    yield module
    while "." in module:
        module = module.partition(".")[2]
        yield module


def find_gaps(modules: Iterable[str]) -> tuple[list[str], list[str]]:
    """Return what is surely wrong and what merely looks uneven, one line each.

    Args:
        modules: Module paths that plain names selected.
    """
    families: dict[str, dict[tuple[int, ...], set[str]]] = defaultdict(lambda: defaultdict(set))
    for module in modules:
        parent, _, child = module.rpartition(".")
        parts = parent.split(".")
        layer = tuple(int(part) for part in parts if part.isdecimal())
        families[".".join("*" if p.isdecimal() else p for p in parts)][layer].add(child)
    wrong: list[str] = []
    uneven: list[str] = []
    for family, layers in sorted(families.items()):
        _look_at_children(family, layers, wrong, uneven)
        _look_at_layers(family, [layer[0] for layer in layers if len(layer) == 1], wrong, uneven)
    return wrong, uneven


def most_siblings(modules: Iterable[str]) -> int:
    """Return how many modules lie side by side in the one that holds most; layers, or experts."""
    most = 0
    previous: list[str] = []
    counts: list[int] = []  # children so far, of each module on the way to the previous one
    for parts in sorted(module.split(".") for module in modules):
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(previous, parts, strict=False))
        shared = len(list(alike))
        kept = counts[: shared + 1]
        counts = kept + [0] * (len(parts) - len(kept))
        for depth in range(shared, len(parts)):
            counts[depth] += 1
        most = max(most, *counts)
        previous = parts
    return most


def _look_at_children(
    family: str,
    layers: Mapping[tuple[int, ...], set[str]],
    wrong: list[str],
    uneven: list[str],
) -> None:
    counts = Counter(frozenset(children) for children in layers.values())
    usual = max(counts, key=lambda children: (counts[children], len(children)))
    odd = [layer for layer, children in layers.items() if children != usual]
    if len(odd) == 1 and layers[odd[0]] < usual:
        missing = ", ".join(sorted(usual - layers[odd[0]]))
        wrong.append(f"{_name(family, odd[0])}: no {missing} but all other layers have it")
    elif odd:
        uneven.append(f"{family}: {len(odd)} of {len(layers)} layers have other modules")


def _look_at_layers(family: str, layers: list[int], wrong: list[str], uneven: list[str]) -> None:
    layers = sorted(layers)
    steps = {after - before for before, after in pairwise(layers)}
    if len(steps) <= 1:
        return
    if layers[:-1] == list(range(len(layers) - 1)):
        last = _name(family, (layers[-1],))
        wrong.append(f"{last}: follows layer {layers[-2]} but the next number is expected")
    else:
        uneven.append(f"{family}: the layer numbers have gaps")


def _name(family: str, layer: tuple[int, ...]) -> str:
    numbers = iter(layer)
    return ".".join(str(next(numbers)) if part == "*" else part for part in family.split("."))
