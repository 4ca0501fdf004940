"""Every command and snippet of docs/your_data.md and docs/your_tasks.md does what it says."""

import json
import re
import shlex
from pathlib import Path
from typing import get_args

import pytest
import yaml
from PIL import Image

from icm_ray.config import FinetuneRecipe, PipelineRecipe, PrepareRecipe, TaskFile, TaskKind
from icm_ray.config.loading import load_recipe
from icm_ray.finetuning.targets import with_targets
from icm_ray.inputs import PLACE
from icm_ray.jobs import JOBS
from icm_ray.suites import find_suite
from icm_ray.suites.tasks import METRICS
from icm_ray.workflows import prepare
from icm_ray.workflows.experts import groups_of

ROOT = Path(__file__).parents[1]
DATA, TASKS = ((ROOT / "docs" / f"your_{name}.md").read_text() for name in ("data", "tasks"))


def snippets(text: str) -> dict[str, str]:
    """Return a page's files by the name in their first line."""
    found = re.findall(r"```yaml\n(# (\S+)\n.*?)```", text, flags=re.DOTALL)
    return {name: content for content, name in found}


def commands(text: str) -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


@pytest.fixture
def folder(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pages' files, with a base that is here and rows as the page has them."""
    for name, content in (snippets(DATA) | snippets(TASKS)).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content.replace("org/model", str(tiny_llama)))
    legal = [{"question": f"{i}?", "reply": "..."} for i in range(40)]
    mood = [{"text": f"text {i}", "answer": "good" if i % 2 else "bad"} for i in range(400)]
    for task, rows in {"legal": legal, "mood": mood}.items():
        text = "\n".join(map(json.dumps, rows))
        (tmp_path / "my_suite" / f"{task}.jsonl").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_look_at_a_suite_counts_its_rows(folder: Path, capsys) -> None:
    (words,) = commands(DATA)
    assert words[:3] == ["python", "-m", "jobs.prepare"]
    recipe = load_recipe(PrepareRecipe, words[4])
    found = prepare.run(recipe, folder / "runs" / "look")
    sizes = found["outputs"]["examples"]["mood"]
    assert (sizes["calibration"], sizes["test"]) == (64, 128)
    assert "mood: " in capsys.readouterr().out
    (folder / "my_suite" / "mood.jsonl").write_text('{"text": 3, "answer": "good"}\n')
    with pytest.raises(Exception, match=r"mood.jsonl: line 1: text: 3 but a text is expected"):
        prepare.run(recipe, folder / "runs" / "look")


def test_images_stand_where_the_page_says(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / "seen" / "a.png")
    parts = [{"type": "text", "text": "see"}, {"type": "image"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "this"}]
    rows = {
        "signs": {"photo": "a.png", "words": "exit"},
        "talk": {"conversation": turns, "photos": ["a.png"]},
    }
    for task, row in rows.items():
        text = "\n".join(json.dumps({**row, "document": str(i)}) for i in range(9))
        (folder / "seen" / f"{task}.jsonl").write_text(text)
    suite = find_suite("seen")
    asked = [suite.load(task, "test", 1).texts[0] for task in rows]
    assert [one.turns[0].content for one in asked] == [
        f"{PLACE} What does the sign say?",
        f"see{PLACE}",
    ]
    assert len({one.images for one in asked}) == 1


def test_boxes_are_written_as_the_page_says(folder: Path) -> None:
    (line,) = re.findall(r"A line is `(.*?)`:", DATA)
    Image.new("RGB", (112, 56)).save(folder / "shelves" / "a.png")
    rows = [json.dumps({**json.loads(line), "document": str(i)}) for i in range(300)]
    (folder / "shelves" / "crockery.jsonl").write_text("\n".join(rows))
    examples = find_suite("shelves").load("crockery", "test", 2)
    assert examples.targets[1].tolist() == [[4, 10, 31.5, 40, 1], [50, 12, 70, 30, 0]]


def test_the_pipeline_s_recipe_is_one(folder: Path) -> None:
    words, training = commands(TASKS)
    assert {job.removeprefix("jobs.") for job in (words[2], training[2])} <= set(JOBS)
    recipe = load_recipe(PipelineRecipe, words[4])
    assert [row.method for row in recipe.methods or []] == ["soup", "distillation"]
    plain = yaml.safe_load((folder / "my_suite" / "suite.yaml").read_text())
    plain["tasks"]["mood"]["expert"] = "moods"  # as the page's comment says
    (folder / "my_suite" / "suite.yaml").write_text(yaml.safe_dump(plain))
    names = [ref.name for ref in recipe.adapters]
    assert find_suite(recipe.suite).experts_of(names) == {"legal": "legal", "mood": "moods"}


def test_the_recipe_that_trains_is_one(folder: Path) -> None:
    recipe = load_recipe(FinetuneRecipe, commands(TASKS)[1][4])
    suite = find_suite(recipe.suite)
    assert [sorted(group) for group in groups_of(recipe, suite)] == [["legal", "mood"]]
    base = Path(str(suite.base))
    assert with_targets(recipe.lora, base, shared=True).targets == ["q_proj", "v_proj"]


def test_the_pages_name_every_key_kind_and_metric() -> None:
    unsaid = {"data", "expert", "source", "licence", "revision"}
    for key in TaskFile.model_fields:
        assert key in unsaid or f"`{key}" in DATA + TASKS or f"{key}:" in DATA + TASKS, key
    assert all(f"`{kind}`" in TASKS for kind in get_args(TaskKind))
    assert all(name in TASKS for names in METRICS.values() for name in names)
