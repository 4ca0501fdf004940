"""How a finished result takes the place of an earlier one, and what killed runs left beside it.

What is temporary lies beside its target and says whose it is: `.<name>.tmp-<owner>-<number>` is
being built, `.<name>.old-<owner>-<number>` is an earlier result that was moved aside. One whose
owner has ended is nobody's, and the next run of that output clears it away.
"""

import contextlib
import ctypes
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from icm_ray.owners import Owner, left_by_the_dead

_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
_SIBLING = re.compile(r"\.(.+)\.(tmp|old)-([0-9a-f]{8}-\d+-\d+)-[0-9a-f]{4}")


def sibling(target: Path, kind: str = "tmp") -> Path:
    """Return a new name beside `target` that says it is this process's.

    Args:
        target: What the sibling is for.
        kind: "tmp" or "old".
    """
    return target.with_name(f".{target.name}.{kind}-{Owner.me().mark}-{secrets.token_hex(2)}")


def swap(temporary: Path, target: Path) -> None:
    """Make the folder `temporary` the folder `target`; an earlier one may be left as `temporary`.

    Where the kernel and the file system can exchange two names, an onlooker finds the earlier
    folder or the new one at any moment. Elsewhere (network file systems, other systems than Linux)
    there is a moment between two renames; a run that is killed in it is mended by `clear`.
    """
    if exchange(temporary, target):
        return
    try:
        temporary.rename(target)  # nothing is there, or an empty folder
    except OSError:
        if not target.exists():
            raise
        old = sibling(target, "old")
        target.rename(old)
        try:
            temporary.rename(target)
        finally:  # whatever came between: an error, Ctrl-C
            if not target.exists():
                old.rename(target)
        shutil.rmtree(old, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False, and nothing done, if that cannot be had."""
    call = getattr(ctypes.CDLL(None), "renameat2", None)
    if call is None:
        return False
    return call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def clear(target: Path) -> None:
    """Remove what ended processes of this machine left beside `target`; a live one's stays.

    A result that such a process had moved aside, and put nothing in its place, is put back.
    """
    _clear(target, left_by_the_dead)


def clear_all(target: Path) -> None:
    """Do as `clear`, inside `target` too and whatever machine it came from.

    To be called by the one run that holds the lock of `target`, before it starts workers.
    """
    inside = {path.with_name(name) for path in target.rglob(".*") if (name := _name_of(path))}
    for one in {target, *inside}:
        _clear(one, lambda _mark: True)


def _name_of(path: Path) -> str | None:
    """Return the name that a temporary sibling is for; None if it is no such thing."""
    found = _SIBLING.fullmatch(path.name)
    return found[1] if found else None


def _clear(target: Path, is_nobodys: Callable[[str], bool]) -> None:
    for path in sorted(target.parent.glob(".*")):
        found = _SIBLING.fullmatch(path.name)
        if not found or found[1] != target.name or not is_nobodys(found[3]):
            continue
        if found[2] == "old" and not target.exists():
            with contextlib.suppress(OSError):  # somebody else was faster
                path.rename(target)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink()
