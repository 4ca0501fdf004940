"""Who made a temporary file or holds a lock: one process of one machine, and whether it still runs.

Process ids are used again, and a shared disk shows those of other machines and containers, so an
owner is a process id with the time of its start, counted from a boot that has an id of its own.
"""

import hashlib
import os
import socket
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")


@dataclass(frozen=True)
class Owner:
    """A process.

    Attributes:
        host: Name of its machine, for people.
        boot: The machine's boot id; empty where the system has none.
        machine: Short hash of boot and process namespace, in which process ids mean something.
        pid: Process id there.
        started: Clock ticks from the boot to its start; 0 where the system does not say.
    """

    host: str
    boot: str
    machine: str
    pid: int
    started: int

    @classmethod
    def me(cls) -> "Owner":
        """Return this process."""
        host, boot = socket.gethostname(), _boot()
        return cls(host, boot, _machine(host, boot), os.getpid(), _started(os.getpid()) or 0)

    @property
    def mark(self) -> str:
        """What names of temporary files say of their owner; see `left_by_the_dead`."""
        return f"{self.machine}-{self.pid}-{self.started}"

    def runs(self) -> bool | None:
        """Say whether the process still runs; None if that cannot be seen from here."""
        me = Owner.me()
        if self.machine == me.machine:
            return _runs(self.pid, self.started)
        rebooted = self.host == me.host and self.boot != me.boot
        return False if rebooted and self.boot else None


def left_by_the_dead(mark: str) -> bool:
    """Say whether `mark` is of a process of this machine that has ended."""
    machine, pid, started = mark.split("-")
    return machine == Owner.me().machine and not _runs(int(pid), int(started))


def _runs(pid: int, started: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return (_started(pid) or 0) == started


def _started(pid: int) -> int | None:
    try:
        stat = (_PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])  # a program's name may hold spaces and ")"


def _boot() -> str:
    try:
        return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _machine(host: str, boot: str) -> str:
    try:
        namespace = os.readlink(_PROC / "self/ns/pid")  # containers of one machine share its boot
    except OSError:
        namespace = ""
    return hashlib.sha256(f"{boot or host} {namespace}".encode()).hexdigest()[:8]
