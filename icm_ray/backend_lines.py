"""Keeps what Ray's C++ says of itself out of a user's terminal; what fails is raised in Python."""

import contextlib
import os
import re
import sys
import threading
from collections.abc import Iterator

LINE = re.compile(
    rb"\[\d{4}-\d\d-\d\d [^\]]+ [DIWE] \d+ \d+\] (\(\w+\) )?[\w./-]+\.(cc|h|cpp):\d+: "
)
"""How such a line starts, such as "[2026-11-30 06:32:09,516 E 192 192] core_worker.cc:2465: ".
Fatal ones have another letter and are shown."""

LEVEL = "RAY_BACKEND_LOG_LEVEL"


@contextlib.contextmanager
def without_backend_lines() -> Iterator[None]:
    """Drop such lines from file descriptor 2 while the body runs; all else passes as it comes.

    A user who sets Ray's own variable for its level wants to see them, and does.
    """
    if LEVEL in os.environ:
        yield
        return
    kept, (reading, writing) = os.dup(2), os.pipe()
    os.dup2(writing, 2)
    os.close(writing)
    told = sys.stderr
    if _is_descriptor_2(told):  # Python's own words need no filter, and may go to a terminal
        told.flush()
        sys.stderr = os.fdopen(os.dup(kept), "w", buffering=1, errors="backslashreplace")
    passing = threading.Thread(target=_pass_on, args=(reading, kept), daemon=True)
    passing.start()
    try:
        yield
    finally:
        if sys.stderr is not told:
            sys.stderr.close()
            sys.stderr = told
        os.dup2(kept, 2)  # ends the pipe
        passing.join(timeout=1.0)  # unless a child still holds it


def _is_descriptor_2(stream: object) -> bool:
    try:
        return stream.fileno() == 2  # type: ignore[attr-defined]
    except (AttributeError, OSError, ValueError):
        return False


def _pass_on(reading: int, kept: int) -> None:
    with os.fdopen(reading, "rb", buffering=0) as lines:
        rest = b""
        while part := lines.read(65536):
            *whole, rest = (rest + part).split(b"\n")
            shown = b"".join(line + b"\n" for line in whole if not LINE.match(line))
            if rest and not rest.startswith(b"["):  # a prompt or a bar waits for no end of line
                shown, rest = shown + rest, b""
            os.write(kept, shown)
        os.write(kept, rest)
