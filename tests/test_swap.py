"""A result takes another's place in one step, and what killed runs left is cleared away."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from icm_ray import owners, swap
from icm_ray.errors import ResourceError
from icm_ray.files import is_done, read_manifest, whole_folder
from icm_ray.owners import Owner, left_by_the_dead
from icm_ray.swap import clear, clear_all, exchange, sibling

ROOT = Path(__file__).parent.parent
WRITER = """
import sys, time
from pathlib import Path
from icm_ray.files import whole_folder
with whole_folder(Path(sys.argv[1]), info={"key": "other"}) as folder:
    (folder / "a.txt").write_text("other")
    print("writing", flush=True)
    time.sleep(600)
"""


def make(target: Path, text: str = "one") -> Path:
    with whole_folder(target, info={"key": text}) as folder:
        (folder / "a.txt").write_text(text)
    return target


def mark_of_a_dead_process() -> str:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = owners._started(process.pid)
    process.communicate(b"\n")
    me = Owner.me()
    return Owner(me.host, me.boot, me.machine, process.pid, started or 0).mark


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a file system that cannot exchange two names."""
    monkeypatch.setattr(swap, "exchange", lambda _one, _other: False)


def test_two_names_are_exchanged(tmp_path: Path) -> None:
    one, other = make(tmp_path / "one"), make(tmp_path / "two words \u00e9", "two")
    if not exchange(one, other):
        pytest.skip("this file system cannot exchange names")
    assert ((one / "a.txt").read_text(), (other / "a.txt").read_text()) == ("two", "one")
    assert not exchange(one, tmp_path / "nothing")
    assert sorted(tmp_path.iterdir()) == [one, other]


@pytest.mark.usefixtures("no_exchange")
def test_without_an_exchange_the_new_folder_comes_and_nothing_is_left(tmp_path: Path) -> None:
    target = make(tmp_path / "out")
    assert is_done(make(target, "two"), "two")
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.usefixtures("no_exchange")
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_an_earlier_folder_survives_a_rename_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    target = make(tmp_path / "out")
    rename = Path.rename

    def fail(self: Path, to: Path) -> Path:
        if ".tmp-" in self.name and (not target.exists() or isinstance(error, OSError)):
            raise error
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises((ResourceError, KeyboardInterrupt)):
        make(target, "two")
    assert (target / "a.txt").read_text() == "one"
    assert list(tmp_path.iterdir()) == [target]


def test_a_killed_writer_s_half_folder_is_cleared_and_a_live_one_s_stays(tmp_path: Path) -> None:
    target = make(tmp_path / "out")
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(target)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        (half,) = tmp_path.glob(".out.tmp-*")
        make(target, "two")
        assert (half / "a.txt").read_text() == "other"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    make(target, "three")
    assert list(tmp_path.iterdir()) == [target]
    assert (target / "a.txt").read_text() == "three"


def test_a_folder_moved_aside_by_a_dead_process_is_put_back(tmp_path: Path) -> None:
    target, mark = make(tmp_path / "out"), mark_of_a_dead_process()
    (tmp_path / f".out.tmp-{mark}-0001").mkdir()
    target.rename(tmp_path / f".out.old-{mark}-0002")
    clear(target)
    assert read_manifest(target)["key"] == "one"
    assert list(tmp_path.iterdir()) == [target]
    os.rename(make(tmp_path / "two", "two"), tmp_path / f".out.old-{mark}-0003")
    clear(target)  # something is in its place, so the older one goes
    assert is_done(target, "one")
    assert list(tmp_path.iterdir()) == [target]


def test_only_what_is_nobody_s_is_cleared(tmp_path: Path) -> None:
    dead, target = mark_of_a_dead_process(), tmp_path / "out"
    mine = sibling(target)
    elsewhere = tmp_path / f".out.tmp-{'0' * 8}-1-2-abcd"
    others = [tmp_path / name for name in (f".out.v2.tmp-{dead}-0001", ".out.tmp-notes", ".out")]
    for path in (mine, elsewhere, *others, inner := tmp_path / "out" / f".x.tmp-{dead}-0002"):
        path.mkdir(parents=True)
    file = tmp_path / f".out.tmp-{dead}-0003"
    file.touch()
    clear(target)
    assert not file.exists()
    assert all(path.exists() for path in (mine, elsewhere, *others, inner))
    clear_all(target)  # by who holds the lock: nobody else's can be alive
    assert not any(path.exists() for path in (mine, elsewhere, inner))
    assert all(path.exists() for path in others)


def test_a_process_id_that_is_used_again_is_another_process() -> None:
    me = Owner.me()
    assert me.runs() is True
    assert not left_by_the_dead(me.mark)
    again = Owner(me.host, me.boot, me.machine, me.pid, me.started + 1)
    assert again.runs() is False
    assert left_by_the_dead(again.mark)
    assert Owner("elsewhere", "x", "0" * 8, me.pid, me.started).runs() is None
    assert Owner(me.host, "an earlier boot", "0" * 8, me.pid, me.started).runs() is False
    assert not left_by_the_dead(f"{'0' * 8}-{me.pid}-1")


def test_a_process_that_starts_later_says_so() -> None:
    before = owners._started(os.getpid())
    time.sleep(0.02)
    mark = mark_of_a_dead_process()
    assert before is not None
    assert int(mark.split("-")[2]) > before
