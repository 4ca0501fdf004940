"""Two runs of one output: one refuses and says who holds it; a lock of the dead is broken."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from command_samples import recipe_of, save_lora

from icm_ray import locks
from icm_ray.errors import InputError
from icm_ray.files import is_done, whole_folder
from icm_ray.locks import Holder, locked
from icm_ray.owners import Owner

ROOT = Path(__file__).parent.parent
RUN = """
import sys
from pathlib import Path
from icm_ray.locks import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of `out` until it is ended."""
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(tmp_path / "out")],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def try_lock(target: Path) -> None:
    with locked(target):
        pass


def elsewhere(**changed: object) -> Holder:
    """Return a holder whose machine cannot be asked."""
    owner = replace(Owner.me(), host="node-7", boot="f" * 36, machine="0" * 8, pid=77)
    return replace(Holder(owner, "2026-01-02T03:04:05Z"), **changed)


def test_a_lock_lies_beside_the_output_and_goes_with_its_run(tmp_path: Path) -> None:
    with locked(tmp_path / "new" / "out"):
        (lock,) = (tmp_path / "new").iterdir()
        assert lock.name == ".out.lock"
        holder = Holder.read(lock.read_bytes())
        assert holder is not None
        assert holder.owner == Owner.me()
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "out"):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_second_run_is_told_who_holds_it(tmp_path: Path, run: subprocess.Popen[str]) -> None:
    host, boot = Owner.me().host, Owner.me().boot[:8]
    told = rf"pid {run.pid} on {re.escape(host)} since \d{{4}}-\d\d-\d\dT[\d:]{{8}}Z, boot {boot}"
    with pytest.raises(InputError, match=told) as caught:
        try_lock(tmp_path / "out")
    assert len(caught.value.problems) == 1
    try_lock(tmp_path / "out2")
    run.communicate("")
    try_lock(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_two_threads_are_two_runs(tmp_path: Path) -> None:
    with locked(tmp_path / "out"), pytest.raises(InputError, match=f"pid {os.getpid()} "):
        try_lock(tmp_path / "out")


def test_of_many_that_start_at_once_one_runs_at_a_time(tmp_path: Path) -> None:
    inside, most, done = [], [], []

    def run() -> None:
        while True:
            try:
                with locked(tmp_path / "out"):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
                    break
            except InputError:
                continue
        done.append(1)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(done), max(most)) == (8, 1)


def test_a_killed_run_s_lock_is_broken_with_one_warning_and_its_leavings_go(
    tmp_path: Path, run: subprocess.Popen[str]
) -> None:
    target = tmp_path / "out"
    with whole_folder(target, info={"key": "k"}) as folder:
        (folder / "a.txt").write_text("a")
    run.send_signal(signal.SIGKILL)
    run.wait()
    inner = target / "experts" / ".year.tmp-0123abcd-5-6-0000"  # a worker's, of another machine
    inner.mkdir(parents=True)
    with pytest.warns(UserWarning, match=rf"gone \(pid {run.pid} on .*\) is broken\.$") as told:
        try_lock(target)
    assert len(told) == 1
    assert not inner.exists()
    assert is_done(target, "k")
    assert list(tmp_path.iterdir()) == [target]


def test_a_silent_lock_of_another_machine_is_broken_and_a_beating_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.05)
    lock, holder = tmp_path / ".out.lock", elsewhere()
    lock.write_bytes(holder.written(3))
    with pytest.warns(UserWarning, match="pid 77 on node-7 since 2026-01-02T03:04:05Z, boot ff"):
        try_lock(tmp_path / "out")
    monkeypatch.setattr(locks, "BEAT_SECONDS", 1.0)
    lock.write_bytes(holder.written(3))
    beat = threading.Timer(0.07, lock.write_bytes, [holder.written(4)])
    beat.start()
    with pytest.raises(InputError, match="pid 77 on node-7"):
        try_lock(tmp_path / "out")
    beat.join()
    assert lock.read_bytes() == holder.written(4)


def test_a_reboot_ends_every_run(tmp_path: Path) -> None:
    owner = replace(Owner.me(), boot="e" * 36, machine="0" * 8)
    (tmp_path / ".out.lock").write_bytes(Holder(owner, "2026").written(1))
    with pytest.warns(UserWarning, match="boot eeeeeeee"):
        try_lock(tmp_path / "out")


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b'{"owner": {"pid": 1}, "since": 1, "beat": 1}']
)
def test_a_lock_that_nobody_wrote_or_was_cut_holds_nothing(tmp_path: Path, text: bytes) -> None:
    (tmp_path / ".out.lock").write_bytes(text)
    try_lock(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_holder_goes_on_saying_that_it_lives() -> None:
    said: list[bytes] = []
    twice = threading.Event()

    def write(text: bytes) -> None:
        said.append(text)
        if len(said) == 3:
            twice.set()

    with locks.beating(write, seconds=0.01):
        assert twice.wait(10)
    holders = [Holder.read(text) for text in said]
    assert [holder and holder.beat for holder in holders] == list(range(len(said)))
    assert len({len(text) for text in said}) == 1


def test_merge_and_export_refuse_an_output_in_use_and_leave_it_alone(cli, tmp_path, run) -> None:
    adapter = save_lora(tmp_path / "a")
    adapters = {"a": adapter, "b": save_lora(tmp_path / "b", 1)}
    recipe = recipe_of(tmp_path / "r.yaml", adapters, output={"path": str(tmp_path / "out")})
    before = sorted(tmp_path.rglob("*"))
    for words in (
        ["merge", "-c", recipe],
        ["export", adapter, "--format", "mlx", "-o", tmp_path / "out"],
    ):
        code, _, err = cli(*words)
        assert code == 3
        assert len(err.splitlines()) == 1
        assert f"out: held by another run (pid {run.pid} on" in err
    assert sorted(tmp_path.rglob("*")) == before  # no results.json of the one that was refused
    run.communicate("")
    code, _, err = cli("merge", "-c", recipe)
    assert (code, err) == (0, "")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["status"] == "done"
    assert not list(tmp_path.glob(".*"))
