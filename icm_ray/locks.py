"""One run of an output at a time: who holds it, and how a lock of the dead is told from a live one.

The lock is a file beside the output, `.<name>.lock`, never inside it. Its holder keeps the kernel's
lock on it (flock), writes who it is, and writes again every few seconds. A second run refuses at
once. What a killed run left is broken with one warning: at once on its own machine, where process
ids can be asked; on another one, only after it has stayed as it is for several beats. No clock and
no time of a file is compared.
"""

import contextlib
import errno
import fcntl
import json
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from icm_ray.errors import InputError
from icm_ray.owners import Owner
from icm_ray.swap import clear_all

BEAT_SECONDS = 5.0
"""A holder says so often that it lives."""
SILENT_BEATS = 4
"""A lock of another machine is broken after so many beats without a word."""

_NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@dataclass(frozen=True)
class Holder:
    """What a lock says of the run that holds it.

    Attributes:
        owner: Its process.
        since: When it began, for people.
        beat: Counts up while it lives.
    """

    owner: Owner
    since: str
    beat: int = 0

    @classmethod
    def me(cls) -> "Holder":
        """Return this process, from now on."""
        return cls(Owner.me(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))

    @classmethod
    def read(cls, text: bytes) -> "Holder | None":
        """Return who wrote `text`; None if nobody of ours did."""
        try:
            plain: dict[str, Any] = json.loads(text)
            return cls(Owner(**plain["owner"]), str(plain["since"]), int(plain["beat"]))
        except (ValueError, TypeError, KeyError):
            return None

    def written(self, beat: int) -> bytes:
        """Return what the lock says at a beat; always of one length, so that none is cut."""
        plain = {"owner": asdict(self.owner), "since": self.since, "beat": beat}
        return f"{json.dumps(plain):<511}\n".encode()

    def __str__(self) -> str:
        boot = f", boot {self.owner.boot[:8]}" if self.owner.boot else ""
        return f"pid {self.owner.pid} on {self.owner.host} since {self.since}{boot}"


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Hold the lock of an output for the body, and clear away what killed runs of it left.

    On a network file system without locks (flock), two runs that begin on two machines within the
    same moment may both get it; any later one is refused.

    Raises:
        InputError: another run holds it.
    """
    path = target.with_name(f".{target.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = _opened(path, target)
    try:
        refuse_living(target, lambda: os.pread(handle, 4096, 0))
        with beating(lambda text: os.pwrite(handle, text, 0)):
            clear_all(target)
            try:
                yield
            finally:
                path.unlink(missing_ok=True)  # while it is held: nobody can be waiting for it
    finally:
        os.close(handle)


def _opened(path: Path, target: Path) -> int:
    """Return the lock file's handle, with the kernel's lock on it where there is one."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = Holder.read(os.pread(handle, 4096, 0))
            os.close(handle)
            raise _held(target, holder) from None
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                os.close(handle)
                raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)  # its holder removed it meanwhile


def refuse_living(target: object, read: Callable[[], bytes], seconds: float | None = None) -> None:
    """Raise InputError if what a lock says is the word of a run that may live; warn if it is not.

    Args:
        target: The output, as messages call it.
        read: Returns what the lock says now.
        seconds: Between two beats of its holder; None: BEAT_SECONDS.
    """
    seconds = BEAT_SECONDS if seconds is None else seconds
    text = read()
    holder = Holder.read(text)
    if holder is None:
        return
    runs = holder.owner.runs()
    if runs is None:
        deadline = time.monotonic() + SILENT_BEATS * seconds
        while not runs and time.monotonic() < deadline:
            time.sleep(seconds / 5)
            runs = read() != text
    if runs:
        raise _held(target, holder)
    warnings.warn(f"{target}: the lock of a run that is gone ({holder}) is broken.", stacklevel=2)


def _held(target: object, holder: Holder | None) -> InputError:
    who = holder or "which has not said yet who it is"
    return InputError(
        f"{target}: held by another run ({who}) but one run of an output at a time is expected. "
        "Wait until it ends, or choose another output."
    )


@contextlib.contextmanager
def beating(write: Callable[[bytes], object], seconds: float = BEAT_SECONDS) -> Iterator[None]:
    """Say that this run lives, at once and every few seconds, while the body runs.

    Args:
        write: Takes what the lock says from now on.
        seconds: Between two beats.
    """
    me, ended = Holder.me(), threading.Event()

    def beat() -> None:
        count = 0
        while not ended.wait(seconds):
            count += 1
            with contextlib.suppress(OSError):  # a full disk ends the work itself, not its lock
                write(me.written(count))

    write(me.written(0))
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
