"""Ctrl-C at any moment of a command's start: 130, one line, no traceback."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = {
    "script": [str(Path(sys.executable).with_name("icm-ray")), "inspect", "nowhere"],
    "module": [sys.executable, "-m", "icm_ray", "inspect", "nowhere"],
    "job": [sys.executable, "-m", "jobs.merge", "-c", "nowhere.yaml"],
}
SLOW = "import time\nopen('importing', 'w').close()\ntime.sleep(60)\n"


def interrupted(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Interrupt a command while it imports what all need, which takes a minute here."""
    (folder / "pydantic.py").write_text(SLOW)
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={"PYTHONPATH": f"{folder}:{ROOT}", "PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (folder / "importing").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that_still_imports_ends_in_one_line(name: str, tmp_path: Path) -> None:
    done = interrupted(COMMANDS[name], tmp_path)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "error: interrupted. Run the same command to resume.\n"


def test_a_program_that_imports_the_package_keeps_its_own_ctrl_c(tmp_path: Path) -> None:
    done = interrupted([sys.executable, "-c", "import icm_ray"], tmp_path)
    assert done.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in done.stderr


def test_work_cleans_up_before_it_ends(tmp_path: Path) -> None:
    """Once work has begun, the signal is an exception again, and after it ends the process."""
    script = """
import os, signal, sys
sys.argv = ["icm-ray"]
from icm_ray import interruption
from icm_ray.command import guarded

def work():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        signal.pause()
    finally:
        print("cleaned up")

assert signal.getsignal(signal.SIGINT) is interruption.leave
print(guarded(work, debug=False)[0])
assert signal.getsignal(signal.SIGINT) is interruption.leave
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split("\n")[:2] == ["cleaned up", "130"], done.stderr
    assert done.stderr == "error: interrupted. Run the same command to resume.\n"


def test_a_signal_that_is_ignored_on_purpose_stays_ignored() -> None:
    script = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.argv = ['icm-ray']; "
        "import icm_ray; print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True"]
