"""The errors a user can meet, and the exit code each one ends a command with.

    ICMRayError
    ├── RecipeError     2  a recipe or command line asks for something that does not exist
    ├── InputError      3  an adapter, base model, data set or evidence file cannot be used
    ├── ResourceError   4  disk or memory ran out
    └── ClusterError    5  the cluster failed after retries; the same command resumes

One error may carry several problems: everything found wrong in a run is told at once.
"""

import re
import unicodedata
from collections.abc import Iterable

MAX_PROBLEM_LENGTH = 400
SHOWN_OF_A_CAUSE = 2
"""How many places that one cause has spoilt get a line each; more share one line."""

_PASSWORD = re.compile(r"(?<=://)[^\s/@]*(?::\S*)?@")
_TOKEN = re.compile(
    r"(?i)(?<=[?&])([\w-]*(?:token|secret|password|key|signature)[\w-]*=)[^\s&'\"]+"
)


class ICMRayError(Exception):
    """Base of every error this package raises on purpose; `problems` holds one line each."""

    exit_code = 1

    def __init__(self, problems: str | Iterable[str]) -> None:
        lines = [problems] if isinstance(problems, str) else list(problems)
        self.problems: tuple[str, ...] = tuple(one_line(line) for line in lines)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type, tuple[list[str]]]:  # travels through Ray intact
        return type(self), (list(self.problems),)


class RecipeError(ICMRayError):
    """A recipe, parameter or command line is wrong."""

    exit_code = 2


class InputError(ICMRayError):
    """An input (adapter, base model, data, evidence) is missing, broken or unsupported."""

    exit_code = 3


class ResourceError(ICMRayError):
    """Disk or memory ran out."""

    exit_code = 4


class ClusterError(ICMRayError):
    """The cluster could not do the work; what is finished is kept and a rerun resumes."""

    exit_code = 5


def counted(number: int, noun: str) -> str:
    """Return "1 adapter" or "2 adapters"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def one_line(text: str) -> str:
    """Return `text` safe for a terminal and a log: one line, without controls and passwords.

    File, task and tensor names come from strangers; an escape sequence or a right-to-left
    override inside one must not rewrite what the reader sees.
    """
    text = masked(text)
    safe = "".join(f"\\x{ord(char):02x}" if _is_unsafe(char) else char for char in text)
    if len(safe) <= MAX_PROBLEM_LENGTH:
        return safe
    # The advice stands at the end of a message, so the middle is what can go.
    keep = (MAX_PROBLEM_LENGTH - 3) // 2
    return f"{safe[:keep]}...{safe[-keep:]}"


def masked(text: str) -> str:
    """Return `text` with *** for the passwords and tokens of addresses in it."""
    return _TOKEN.sub(r"\1***", _PASSWORD.sub("***@", text))


def _is_unsafe(char: str) -> bool:
    # Controls, formats and surrogates; and U+2028 and U+2029, which end a line too.
    category = unicodedata.category(char)
    return category[0] == "C" or category in ("Zl", "Zp")


def by_cause(problems: Iterable[tuple[str, str]], joined_by: str = ": ") -> list[str]:
    """Return a line `where: what` for each problem; of many with one cause, one for all of them.

    Args:
        problems: Where and what of each, such as a tensor's name and what is wrong with it.
        joined_by: What stands between the two.
    """
    places: dict[str, list[str]] = {}
    for where, what in problems:
        places.setdefault(what, []).append(where)
    lines = []
    for what, names in places.items():
        if len(names) > SHOWN_OF_A_CAUSE:
            lines.append(f"{names[0]}{joined_by}{what} (And {len(names) - 1} more.)")
        else:
            lines += [f"{name}{joined_by}{what}" for name in names]
    return lines


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known word nearest to `word`, or an empty string."""
    from difflib import get_close_matches

    near = get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
