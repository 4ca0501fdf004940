"""A scorer beside a suite runs only where a recipe allows it, and its mistakes are said as its."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import yaml

from icm_ray.command import run_recipe
from icm_ray.config import ALLOW_CODE_VARIABLE, EvaluateRecipe
from icm_ray.errors import InputError, RecipeError
from icm_ray.evaluation.metrics import score
from icm_ray.jobs import JOBS
from icm_ray.suites import checked_suite
from icm_ray.suites.own_scorer import OwnScorer

NEAR = """
def near(said, wanted):
    return max(0.0, 1 - abs(float(said) - float(wanted)))
"""


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    task = {"kind": "regression", "metric": "judging:near", "head": "head.safetensors"}
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump({"base": "x", "tasks": {"age": task}}))
    rows = [json.dumps({"text": f"text {i}", "answer": i / 10}) for i in range(20)]
    (tmp_path / "age.jsonl").write_text("\n".join(rows))
    (tmp_path / "judging.py").write_text(NEAR)
    return tmp_path


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOW_CODE_VARIABLE, "1")


def problem_of(suite: Path) -> str:
    with pytest.raises(RecipeError) as caught:
        checked_suite(suite)
    (line,) = caught.value.problems
    return line


def test_it_does_not_run_by_itself(suite, monkeypatch) -> None:
    monkeypatch.delenv(ALLOW_CODE_VARIABLE, raising=False)
    told = suite / "ran"
    (suite / "judging.py").write_text(f"open({str(told)!r}, 'w')\n{NEAR}")
    line = problem_of(suite)
    assert "tasks.age.metric: 'judging:near' is Python of the suite" in line
    assert "set allow_code: true in the recipe" in line
    assert not told.exists()


def test_a_recipe_opens_the_door(suite, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv(ALLOW_CODE_VARIABLE, "0")
    plain = {
        "suite": str(suite),
        "experts": ["a"],
        "adapters": ["a"],
        "output": str(tmp_path / "o"),
    }
    for door, word in ((False, "is Python of the suite"), (True, "")):
        seen = {}

        def work(recipe, target, seen=seen):
            seen["suite"] = checked_suite(Path(recipe.suite))
            return {}

        code = run_recipe(EvaluateRecipe, work, {**plain, "allow_code": door}, [], debug=False)
        assert code == (0 if door else 2)
        assert word in capsys.readouterr().err
    assert seen["suite"].tasks["age"].metric == "judging:near"
    assert JOBS["evaluate"].kind is EvaluateRecipe


@pytest.mark.usefixtures("allowed")
def test_it_scores_with_an_interval_and_travels(suite) -> None:
    task = pickle.loads(pickle.dumps(checked_suite(suite).tasks["age"]))
    (suite / "judging.py").unlink()  # what travels is its text
    assert task.scorer("0.25", 0.5) == 0.75
    found = score(task, np.array([1.0, 0.5, 0.0, 0.5]), np.ones(4))
    assert (found.metric, found.value, found.spearman) == ("judging:near", 0.5, None)
    assert 0 <= found.low < 0.5 < found.high <= 1


@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (None, "there is no judging.py"),
        ("def other(a, b): return 1", "judging.py has other"),
        ("def nearly(a, b): return 1", "Did you mean 'nearly'?"),
        ("def near(:", "no Python"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(suite, code, words) -> None:
    (suite / "judging.py").unlink() if code is None else (suite / "judging.py").write_text(code)
    assert words in problem_of(suite)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("return 1 / 0", "fails on 'yes' (ZeroDivisionError"),
        ("return None", "fails on 'yes' (TypeError"),
        ("return 2", "gives 2 for 'yes'"),
        ("return float('nan')", "gives nan for 'yes'"),
    ],
)
def test_its_own_mistakes_are_said_as_such(code, words) -> None:
    scorer = OwnScorer("judging:near", f"def near(said, wanted):\n    {code}\n")
    with pytest.raises(InputError) as caught:
        scorer("yes", "no")
    assert words in caught.value.problems[0]
    assert caught.value.problems[0].startswith("judging.py: ")


@pytest.mark.usefixtures("allowed")
def test_only_answers_can_be_scored_so(suite) -> None:
    file = suite / "suite.yaml"
    task = {"kind": "language_modelling", "metric": "judging:near"}
    file.write_text(yaml.safe_dump({"tasks": {"age": task}}))
    assert "a language_modelling has none of one's own" in problem_of(suite)
