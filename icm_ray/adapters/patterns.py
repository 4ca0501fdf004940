r"""PEFT's `rank_pattern` and `alpha_pattern`: which number counts for which module.

PEFT matches every key as the regular expression `(.*\.)?(KEY)$` against the module's path and
takes the first key that matches. A key from a stranger can keep Python's `re` busy for centuries,
so only keys whose worst case is known are run.
"""

import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping

MAX_PATTERN_LENGTH = 500
MAX_MATCH_STEPS = 500_000_000
"""Upper bound for all comparisons of one table with one adapter; some seconds of work."""

_LITERAL = re.compile(r"(\^?)((?:[\w\-]|\\\W)+)")
_SAFE = re.compile(
    r"(?:[\w\-|^$]"  # a plain character, an alternative, an anchor
    r"|\\\W"  # an escaped dot or other punctuation
    r"|(?:\.|\\[dw]|\[[\w\-]+\])(?:[*+?]\??|\{\d{1,2}(?:,\d{1,2})?\})?"  # any one, how often
    r"|\((?:\?:)?(?:[\w\-|]|\\\W)+\)(?![*+?{])"  # a group of names, never repeated
    r")+"
)
_UNBOUNDED = re.compile(r"(?<!\\)[*+]")
_REPEATED_GROUP = re.compile(r"\)[*+?{]|\\[1-9]|\(\?[^:]")

Number = int | float


def unsafe_pattern(key: str) -> str | None:
    """Say why `key` may not be run, or None if its matching time is known to be small."""
    if len(key) > MAX_PATTERN_LENGTH:
        return f"{len(key)} characters long"
    if not compiles(key):
        return "no valid regular expression"
    if not _SAFE.fullmatch(key) or len(_UNBOUNDED.findall(key)) > 3:
        return "a regular expression that could run for ever"
    return None


def compiles(pattern: str) -> bool:
    """Say whether `pattern` is a valid regular expression. It is not run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def may_run_for_ever(pattern: str) -> bool:
    """Say whether a valid `pattern` repeats a group or looks back, the roots of endless matching.

    For `target_modules` and `exclude_modules`, which are shown to the reader but never run here.
    """
    return len(pattern) > 10 * MAX_PATTERN_LENGTH or bool(_REPEATED_GROUP.search(pattern))


def match_all(
    table: Mapping[str, Number], modules: Iterable[str], default: Number
) -> tuple[dict[str, Number], list[str]]:
    """Return the number of every module, and the modules whose keys contradict each other.

    A module's number is that of the first key that matches, else `default`. PEFT sorts the keys
    when it saves, so where two matching keys differ, the file may not mean what was trained.

    Args:
        table: Keys that `unsafe_pattern` has passed, in the order of the file.
        modules: Paths in the base model.
        default: The number of modules that no key matches.

    Raises:
        ValueError: together the keys and modules need more than `MAX_MATCH_STEPS` comparisons.

    Cost: linear for plain names, modules x keys for true regular expressions.
    """
    numbers = list(table.values())
    exact: dict[str, list[int]] = defaultdict(list)
    suffixes: dict[str, list[int]] = defaultdict(list)
    wild: list[tuple[int, re.Pattern[str]]] = []
    for order, key in enumerate(table):
        if literal := _LITERAL.fullmatch(key):
            plain = re.sub(r"\\(\W)", r"\1", literal[2])
            (exact if literal[1] else suffixes)[plain].append(order)
        else:
            wild.append((order, re.compile(key)))
    modules = list(modules)
    _check_budget(modules, [pattern.pattern for _, pattern in wild])

    found, torn = {}, []
    for module in modules:
        starts = [0, *(at + 1 for at, char in enumerate(module) if char == ".")]
        orders = [*exact.get(module, ())]
        orders += [order for at in starts for order in suffixes.get(module[at:], ())]
        orders += [o for o, key in wild if any(key.fullmatch(module, at) for at in starts)]
        found[module] = numbers[min(orders)] if orders else default
        if len({numbers[order] for order in orders}) > 1:
            torn.append(module)
    return found, torn


def _check_budget(modules: list[str], patterns: list[str]) -> None:
    powers = [len(_UNBOUNDED.findall(pattern)) for pattern in patterns]
    steps = sum(len(module) ** power for module in modules for power in powers)
    if steps > MAX_MATCH_STEPS:
        raise ValueError(f"{len(patterns)} regular expressions for {len(modules)} modules")
