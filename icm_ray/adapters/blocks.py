"""Where in a stack of blocks a module is, from its path."""

import re
from collections.abc import Iterable

from icm_ray.errors import RecipeError

_INDEX = re.compile(r"^(.*?\.)?(\d+)(\.|$)")


def block_index(path: str) -> int | None:
    """Return the index of the block a module is in: the first number of its path."""
    found = _INDEX.match(path)
    return int(found[2]) if found else None


def block_path(path: str) -> str | None:
    """Return the path of the block a module is in, up to and with its index."""
    found = _INDEX.match(path)
    return f"{found[1] or ''}{found[2]}" if found else None


def ends_in(path: str, ends: Iterable[str]) -> bool:
    """Say whether a path is one of some names, or ends in one after a dot."""
    return any(f".{path}".endswith(f".{end}") for end in ends)


def runs_of(modules: Iterable[str], runs: int) -> dict[str, int]:
    """Return which of `runs` equal runs of blocks each module is in; the first has what is in none.

    Raises:
        RecipeError: there are fewer blocks than runs.
    """
    of = {module: block_index(module) for module in modules}
    blocks = sorted({block for block in of.values() if block is not None})
    if len(blocks) < runs:
        raise RecipeError(
            f"{runs} groups of layers but the adapters have {len(blocks)} blocks. Ask for fewer."
        )
    run = {block: i * runs // len(blocks) for i, block in enumerate(blocks)}
    return {module: 0 if block is None else run[block] for module, block in of.items()}


def depths_of(modules: Iterable[str]) -> dict[str, float]:
    """Return how deep each module is: 0 in the first block, 1 in the last; others are left out."""
    blocks = {m: b for m in modules if (b := block_index(m)) is not None}
    first, last = min(blocks.values(), default=0), max(blocks.values(), default=0)
    return {module: (block - first) / max(last - first, 1) for module, block in blocks.items()}
