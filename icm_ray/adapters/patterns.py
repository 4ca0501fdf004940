r"""PEFT's `rank_pattern` and `alpha_pattern`: which number counts for which module.

PEFT matches every key as the regular expression `(.*\.)?(KEY)$` against the module's path and
takes the first key that matches. A key from a stranger can keep Python's `re` busy for centuries,
so only keys whose worst case is known and small are run. Keys that are names, which nearly all
are, are looked up and cost nothing; their unescaped dots stand for any character, as in PEFT.
"""

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

MAX_PATTERN_LENGTH = 500
MAX_REGEXES = 1000
"""Keys of one table that are more than names."""
MAX_WAYS = 10_000_000
"""In how many ways `re` may try one key on a path of `TYPICAL_LENGTH`; three `.*` are a million."""
MAX_TARGET_WAYS = 10**11
"""The same for patterns that are never run here: trainers write five `.*` and words in between."""
MAX_MATCH_STEPS = 200_000_000
"""Upper bound for all tries of one table with one adapter; seconds of work, at worst twenty."""
TYPICAL_LENGTH = 100
CALL_STEPS = 20
"""What starting `re` costs, in ways that it could have tried meanwhile."""

_NAME = re.compile(r"(\^?)((?:[\w\-.]|\\\W)+)\$?")
_SAFE = re.compile(
    r"(?:[\w\-|^$]"  # a plain character, an alternative, an anchor
    r"|\\\W"  # an escaped dot or other punctuation
    r"|(?:\.|\\[dw]|\[[\w\-]+\])(?:[*+?]\??|\{\d{1,2}(?:,\d{1,2})?\})?"  # any one, how often
    r"|\((?:\?:)?(?:[\w\-|]|\\\W)+\)(?![*+?{])"  # a group of names, never repeated
    r")+"
)
_REPEATED_GROUP = re.compile(r"\)[*+?{]|\\[1-9]|\(\?[^:]")
_GROUP = re.compile(r"\((?:\?:)?([^()]*)\)")
_REPEAT = re.compile(r"(?P<all>[*+]|\{\d*,\})|\{\d*,(?P<most>\d+)\}|(?P<maybe>(?<![*+?}(])\?)")
_ANY = "\0"
"""Stands for a dot that any character matches; no path holds it."""

Number = int | float


def unsafe_keys(table: Iterable[str]) -> list[str]:
    """Return what is unsafe about the keys of a table, one line each."""
    regexes = [key for key in table if not _NAME.fullmatch(key)]
    if len(regexes) > MAX_REGEXES:
        return [f"{len(regexes)} regular expressions, of which {MAX_REGEXES} may be,"]
    reasons = ((key, unsafe_pattern(key)) for key in table)
    return [f"{key[:60]!r} is {reason}" for key, reason in reasons if reason]


def unsafe_pattern(key: str) -> str | None:
    """Say why `key` may not be run, or None if its matching time is known to be small."""
    if len(key) > MAX_PATTERN_LENGTH:
        return f"{len(key)} characters long"
    if _NAME.fullmatch(key):
        return None
    if not compiles(key):
        return "no valid regular expression"
    if not _SAFE.fullmatch(key) or _ways(key, TYPICAL_LENGTH) > MAX_WAYS:
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
    """Say whether a valid `pattern` repeats a group, looks back, or can be tried in endless ways.

    For `target_modules` and its kin, which are shown to the reader but never run here.
    """
    return (
        len(pattern) > 10 * MAX_PATTERN_LENGTH
        or bool(_REPEATED_GROUP.search(pattern))
        or _ways(pattern, TYPICAL_LENGTH) > MAX_TARGET_WAYS
    )


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
        ValueError: together the keys and modules need more than `MAX_MATCH_STEPS`.

    Cost: linear for names, modules x keys for true regular expressions.
    """
    numbers = list(table.values())
    names = _Names()
    regexes = {order: key for order, key in enumerate(table) if not names.add(key, order)}
    modules = list(modules)
    _check_steps(modules, names, list(regexes.values()))
    wild = [(order, re.compile(key)) for order, key in regexes.items()]

    result, torn = {}, []
    for module in modules:
        starts = _starts(module)
        orders = [order for at in starts for order in names.matching(module, at)]
        orders += [o for o, key in wild if any(key.fullmatch(module, at) for at in starts)]
        result[module] = numbers[min(orders)] if orders else default
        if len({numbers[order] for order in orders}) > 1:
            torn.append(module)
    return result, torn


@dataclass(frozen=True)
class _Names:
    """Keys that are names, by what they say, and the places of their dots by their length."""

    orders: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    dots: dict[int, set[tuple[int, ...]]] = field(default_factory=lambda: defaultdict(set))

    def add(self, key: str, order: int) -> bool:
        """Take `key` in if it is a name, and say whether it is one."""
        name = _NAME.fullmatch(key)
        if name is None:
            return False
        plain = re.sub(r"\\(\W)|(\.)", lambda one: one[1] or _ANY, name[2])
        self.orders[name[1] + plain].append(order)
        self.dots[len(plain)].add(tuple(i for i, char in enumerate(plain) if char == _ANY))
        return True

    def matching(self, module: str, at: int) -> Iterable[int]:
        """Yield the orders of the names that `module` ends in from `at` on."""
        ending = module[at:]
        for dots in self.dots.get(len(ending), ()):
            chars = list(ending)
            for dot in dots:
                chars[dot] = _ANY
            name = "".join(chars)
            yield from self.orders.get(name, ())
            yield from self.orders.get(f"^{name}", ()) if at == 0 else ()


def _starts(module: str) -> list[int]:
    return [0, *(at + 1 for at, char in enumerate(module) if char == ".")]


def _check_steps(modules: list[str], names: _Names, patterns: list[str]) -> None:
    lengths = Counter(len(module) - at for module in modules for at in _starts(module))
    looks = {length: n * len(names.dots.get(length, ())) for length, n in lengths.items()}
    steps = sum(n * (CALL_STEPS + 2 * length) for length, n in looks.items())
    for pattern in patterns:
        steps += sum(n * (CALL_STEPS + _ways(pattern, length)) for length, n in lengths.items())
        if steps > MAX_MATCH_STEPS:
            break
    if steps > MAX_MATCH_STEPS:
        keys = len(names.orders) + len(patterns)
        raise ValueError(f"{keys} regular expressions for {len(modules)} modules")


def _ways(pattern: str, length: int) -> int:
    """Return an upper bound of the ways in which a pattern that repeats no group is tried.

    A repeated character takes any number of those left, and of a group's names only those that
    begin alike can match at one place.
    """
    plain = re.sub(r"\\.|\[[^\]]*\]", "x", pattern)
    ways = _GROUP.sub("", plain).count("|") + 1
    for group in _GROUP.findall(plain):
        names = group.split("|")
        ways *= max(sum(name.startswith(other) for other in names) for name in names)
    for repeat in _REPEAT.finditer(plain):
        most = length if repeat["all"] else int(repeat["most"] or 1)
        ways *= min(most, length) + 1
    return ways
