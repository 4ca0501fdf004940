"""Every command and snippet of the README does what it says."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import icm_ray
from icm_ray.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def user_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_adapter: Callable[..., icm_ray.Adapter]
) -> Path:
    """A folder with the README's two adapters and its recipe."""
    for seed, name in enumerate(("legal", "medical")):
        icm_ray.save_adapter(make_adapter(name, seed=seed), tmp_path / "adapters" / name)
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.jsonl").write_text('{"prompt": "why", "answer": "so"}\n')
    (tmp_path / "my_merge.yaml").write_text(blocks("yaml")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_merge_commands_run_in_their_order(user_folder: Path) -> None:
    commands = [
        shlex.split(line, comments=True)[1:]
        for block in blocks("sh")
        for line in block.splitlines()
        if line.startswith("icm-ray ")
    ]
    first = ["merge", "inspect", "plan", "merge", "verify", "reproduce", "init", "run"]
    assert [words[0] for words in commands] == first
    assert commands.pop()[1] == "pipeline"  # what it runs is proven by the jobs' own tests
    for words in commands:
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0, (words, result.output)
    assert (user_folder / "merged/both/adapter_model.safetensors").is_file()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_python_snippet_runs(user_folder: Path) -> None:
    exec(compile(blocks("python")[0], "README.md", "exec"), {})
    assert icm_ray.load_adapter(user_folder / "merged/both").max_rank <= 16


def test_every_file_it_names_exists() -> None:
    named = set(re.findall(r"configs/[\w/]+\.yaml|docs/[\w/]+\.md|\]\(([\w./-]+)\)", README))
    named |= set(re.findall(r"(?:configs|docs)/[\w/-]+\.(?:yaml|md)", README))
    missing = [name for name in named if name and not (ROOT / name).exists()]
    assert named
    assert missing == []


def test_every_job_is_listed() -> None:
    jobs = {path.stem for path in (ROOT / "jobs").glob("*.py")} - {"__init__"}
    assert jobs == set(re.findall(r"`jobs\.(\w+)`", README))


def test_every_method_is_listed() -> None:
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", README, flags=re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert set(icm_ray.METHODS) <= listed


def test_the_first_screen_has_two_lines_that_stand_alone() -> None:
    lines = blocks("sh")[0].splitlines()
    setup = 'python3 -m venv .venv && .venv/bin/pip install -e ".[dev]" && .venv/bin/'
    assert [line.startswith(setup) for line in lines] == [True, True]
    job, tests = (line.removeprefix(setup) for line in lines)
    assert job == "python -m jobs.pipeline -c configs/pipeline/quickstart.yaml"
    assert tests == "pytest"
    ci = (ROOT / ".ci" / "run").read_text()
    assert job in ci
    assert "pytest" in ci
