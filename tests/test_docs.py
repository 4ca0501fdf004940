"""The pages of docs/: their numbers are those of the tables, and their commands run."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from command_samples import save_lora
from typer.testing import CliRunner

from icm_ray.cli import app
from icm_ray.config import PipelineRecipe
from icm_ray.config.loading import load_recipe
from icm_ray.importing.first_files import RECIPE
from icm_ray.report.data import ScoreRow
from icm_ray.report.summary import summarise
from icm_ray.suites import SUITE_FILE

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
SUITES = {"text": "own", "generation": "shared", "lm": "shared", "vision": "shared"}


@pytest.fixture(scope="module")
def kept():
    """Mean and worst share of each row as the page writes them, by suite; learned tables win."""
    found = {suite: {} for suite in SUITES}
    for suite, init in SUITES.items():
        for part in ("report", "learned"):
            if not (file := DOCS / "results" / suite / part / "results.parquet").is_file():
                continue
            told = pq.read_table(file).to_pylist()
            rows = [ScoreRow(**{**row, "seen": bool(row.get("seen", True))}) for row in told]
            for row in summarise(rows, "test").of_init(init):
                text = f"{100 * row.mean.mean:.0f} / {100 * row.worst.mean:.0f}"
                found[suite].setdefault(row.label, []).append(text)
    return found


def test_the_decision_table_is_our_own_evidence(kept):
    page = (DOCS / "choosing.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    rows = [row for row in (re.split(r"\s*\|\s*", " | ".join(row)) for row in rows) if len(row) > 6]
    checked = 0
    for _, _, label, *cells in rows[2:]:
        for suite, cell in zip(SUITES, cells, strict=True):
            if cell:
                assert cell in kept[suite][label], (label, suite)
                checked += 1
    assert checked >= 30


def test_who_loses_beside_who_shares_is_our_own_evidence():
    """The outcome columns are what RegMean at its default kept, by gain and by share."""
    named = {"texts": "lm", "answers": "generation"}
    part = (DOCS / "choosing.md").read_text().split("## Who shares inputs")[1]
    rows = [line.strip("| ").split(" | ") for line in part.splitlines() if line.startswith("| ")]
    for experts, _, _, gain, share, _ in rows[2:]:
        suite, _, which = experts.partition(", ")
        file = DOCS / "results" / named.get(suite, suite) / "report" / "results.parquet"
        own = "-seed".join((which or "shared 0").split())
        told = [
            row
            for row in pq.read_table(file).to_pylist()
            if (row["split"], row["method"], row["expert_set"]) == ("test", "regmean", own)
            and not row["tuned"]
        ]
        for cell, column in ((gain, "gain_kept"), (share, "normalised")):
            least = min(told, key=lambda row: row[column])
            task, value = cell.split()
            assert task == least["task"], experts
            places = len(value.partition(".")[2])
            assert float(value) == round(least[column], places)
    assert len(rows) == 7


def test_the_null_space_pages_numbers_are_our_own_evidence():
    """Every cell of the table of objectives is a row of the suite's own tables."""
    part = (DOCS / "nsc.md").read_text().split("## The objective")[1].split("##")[0]
    lines = [line.strip("| ") for line in part.splitlines() if line.startswith("| ")]
    rows = [re.split(r"\s*\|\s*", line) for line in lines]
    checked = 0
    for name, *cells in rows[2:]:
        suite = re.search("text|lm|generation|vision", name)[0]
        init = "own" if "own init" in name else "shared"
        kept = []
        for file in sorted((DOCS / "results" / suite).glob("*/results.parquet")):
            told = pq.read_table(file).to_pylist()
            scores = [ScoreRow(**{**row, "seen": bool(row.get("seen", True))}) for row in told]
            if name.endswith("`rotation`"):
                scores = [row for row in scores if row.task != "rotation"]
            for row in summarise(scores, "test").of_init(init):
                kept.append((100 * row.mean.mean, 100 * row.worst.mean))
        for cell in filter(None, cells):
            mean, worst = map(float, cell.split(" / "))
            assert any(abs(mean - m) < 0.06 and abs(worst - w) < 0.06 for m, w in kept), cell
            checked += 1
    assert checked == 31


@pytest.fixture
def guide(tmp_path, monkeypatch):
    """The guide's folder: two adapters and their chats."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats").mkdir()
    turns = [{"role": "user", "content": "where"}, {"role": "assistant", "content": "here"}]
    for seed, name in enumerate(("billing", "returns")):
        save_lora(tmp_path / "adapters" / name, seed, task_type="CAUSAL_LM")
        chats = "".join(json.dumps({"messages": turns}) + "\n" for _ in range(4))
        (tmp_path / "chats" / f"{name}.jsonl").write_text(chats)
    return tmp_path


def commands(page):
    blocks = re.findall(r"```sh\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def test_the_guides_commands_run_in_their_order(guide, tiny_bert):
    for words in commands("guide.md"):
        assert words[0] == "icm-ray"
        if words[2] == "pipeline":  # what it would plan or run loads; both have tests of their own
            recipe = load_recipe(PipelineRecipe, words[4], words[5:])
            assert recipe.methods is None
            assert [ref.name for ref in recipe.adapters] == ["billing", "returns"]
            assert recipe.output == "runs/chats"
            if words[1] == "run":
                shutil.copytree(guide / "merged" / "first", guide / "runs" / "chats" / "adapter")
            continue
        if words[1] == "export":
            words[words.index("BASE")] = str(tiny_bert)
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, (words, result.output)
    suite = yaml.safe_load((guide / "chats" / SUITE_FILE).read_text())
    assert suite["base"] == "tiny"
    expected = {"kind": "generation", "messages": "messages"}
    assert suite["tasks"] == {"billing": expected, "returns": expected}
    assert (guide / "chats" / RECIPE).is_file()


def test_the_other_pages_commands_run():
    for words in commands("choosing.md"):
        result = CliRunner().invoke(app, words[1:])
        assert result.exit_code == 0, (words, result.output)
