"""Each command of docs/operations.md is run, read, or marked with what it needs."""

import os
import re
import shlex
import stat
import subprocess
from pathlib import Path

import pytest

from icm_ray import config, errors
from icm_ray.command import TERMINATED
from icm_ray.config.loading import load_recipe
from icm_ray.interruption import CODE as INTERRUPTED

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "operations.md").read_text()
LINES = [
    line
    for block in re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL)
    for line in block.splitlines()
    if line
]
UNTESTED = [line for line in LINES if "# untested: " in line]
ELSEWHERE = ("ray up", "ray down", "ray dashboard", "kubectl", "docker", "sbatch")
"""What no test machine has."""


def test_only_what_needs_another_machine_is_left_untested() -> None:
    assert UNTESTED
    for line in UNTESTED:
        assert line.startswith(ELSEWHERE), line
        assert line.partition("# untested: ")[2].startswith("needs ")


@pytest.mark.parametrize("line", [line for line in LINES if "-c configs/" in line])
def test_recipes_load_with_what_the_command_changes(line: str) -> None:
    words = shlex.split(line, comments=True)
    at = words.index("-c")
    kind = "merge" if words[at - 1] == "plan" else words[at - 1].removeprefix("jobs.")
    name = f"{kind.title().replace('_', '')}Recipe"
    load_recipe(getattr(config, name), ROOT / words[at + 1], words[at + 2 :])
    if words[0] != "icm-ray":
        assert words[at - 3 : at] == ["python", "-m", f"jobs.{kind}"]
        assert (ROOT / "jobs" / f"{kind}.py").is_file()


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("pytest ")])
def test_tests_that_are_named_are_there(line: str) -> None:
    _, path, option, mark = shlex.split(line)
    assert option == "-m"
    text = (ROOT / path).read_text()
    assert all(f"mark.{one}" in text for one in mark.split(" or "))


def test_the_token_is_readable_by_its_owner_alone(tmp_path: Path) -> None:
    (line,) = [line for line in LINES if line.startswith("(umask")]
    subprocess.run(["bash", "-c", line], env={**os.environ, "HOME": str(tmp_path)}, check=True)
    token = tmp_path / ".ray" / "icm-ray-token"
    assert re.fullmatch(r"[0-9a-f]{64}\n", token.read_text())
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert stat.S_IMODE(token.parent.stat().st_mode) == 0o700


def test_every_command_is_looked_at() -> None:
    known = ("-c configs/", "pytest ", "(umask", "# untested: ")
    assert [line for line in LINES if not any(word in line for word in known)] == []


def test_exit_codes_are_those_of_the_errors() -> None:
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, flags=re.MULTILINE)}
    ours = {kind.exit_code for kind in errors.ICMRayError.__subclasses__()}
    assert told == {0, 1, *ours, INTERRUPTED, TERMINATED}


def test_every_fault_has_its_proof() -> None:
    proofs = re.findall(r"\| `(tests/[\w/]+\.py)::(\w+)` \|$", PAGE, flags=re.MULTILINE)
    assert len(proofs) >= 15
    for path, name in proofs:
        assert f"def {name}(" in (ROOT / path).read_text(), (path, name)


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([\w./-]+)\)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
