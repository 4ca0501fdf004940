"""What `icm-ray init` says of a stranger's adapters and data files."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from command_samples import save_lora

from icm_ray.config import PipelineRecipe
from icm_ray.config.loading import load_recipe
from icm_ray.importing.first_files import GUESS
from icm_ray.importing.guesses import guessed_task
from icm_ray.suites import find_suite


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("rows", "language", "expected"),
    [
        (
            [{"messages": [{"role": "user", "content": "hi"}]}],
            True,
            {"kind": "generation", "messages": "messages"},
        ),
        (
            [{"id": 1, "question": "why", "reply": "so"}],
            True,
            {"kind": "generation", "prompt": "{question}", "answer": "reply"},
        ),
        ([{"Prompt": "why"}], True, {"kind": "generation", "prompt": "{Prompt}"}),
        (
            [{"photo": "a.png", "question": "what", "answer": "this"}],
            True,
            {"kind": "generation", "image": "photo", "prompt": "{photo} {question}"}
            | {"answer": "answer"},
        ),
        (
            [{"messages": [{"role": "user", "content": "hi"}], "images": ["a.png"]}],
            True,
            {"kind": "generation", "messages": "messages", "image": "images"},
        ),
        (
            [{"premise": "a", "hypothesis": "b", "label": n % 3} for n in range(9)],
            False,
            {"kind": "classification", "text": "premise", "text_pair": "hypothesis"}
            | {"answer": "label"},
        ),
        (
            [{"sentence1": "a", "sentence2": "b", "score": 2.5}, {"sentence1": "c", "score": 1}],
            False,
            {"kind": "regression", "text": "sentence1", "text_pair": "sentence2"}
            | {"answer": "score"},
        ),
        (
            [{"text": "a", "label": name} for name in ("good", "bad") * 3],
            False,
            {"kind": "classification", "text": "text", "answer": "label"},
        ),
        ([{"text": "words"}], True, {"kind": "language_modelling", "text": "text"}),
        ([{"text": "words"}], False, {"kind": "classification", "text": "text"}),
        (
            [{"id": "7", "abstract": "a long text"}],
            True,
            {"kind": "language_modelling", "text": "abstract"},
        ),
        (
            [{"image": "a.png", "label": name} for name in ("cat", "dog") * 3],
            False,
            {"kind": "classification", "image": "image", "answer": "label"},
        ),
        ([{"photo": "a.png"}], False, {"kind": "classification", "image": "photo"}),
        (
            [{"image": "a.png", "score": 0.5}],
            False,
            {"kind": "regression", "image": "image", "answer": "score"},
        ),
        (
            [{"image": "a.png", "boxes": [[0, 0, 9, 9, "pot"]]}, {"image": "b.png", "boxes": []}],
            False,
            {"kind": "detection", "image": "image", "answer": "boxes", "classes": ["pot"]},
        ),
        (
            [{"image": "a.png", "objects": [[0, 0, 9, 9, 2]]}],
            False,
            {"kind": "detection", "image": "image", "answer": "objects"}
            | {"classes": ["0", "1", "2"]},
        ),
        (
            [{"image": "a.png", "label": [0, 1, 1, 0]}],
            False,
            {"kind": "dense_classification", "image": "image", "answer": "label"},
        ),
        (
            [{"image": "a.png", "target": [0.5, 1.0]}],
            False,
            {"kind": "dense_regression", "image": "image", "answer": "target"},
        ),
    ],
)
def test_columns_are_guessed_by_name_and_values(tmp_path, rows, language, expected):
    file = lines(tmp_path / "task.jsonl", *rows)
    assert guessed_task(file, is_language_model=language) == expected


def test_a_nested_column_of_a_table_is_a_chat(tmp_path):
    turns = [[{"role": "user", "content": "hi"}]]
    pq.write_table(pa.table({"id": [1], "conversation": turns}), tmp_path / "t.parquet")
    found = guessed_task(tmp_path / "t.parquet", is_language_model=True)
    assert found == {"kind": "generation", "messages": "conversation"}


def test_boxes_of_a_table_are_a_detection(tmp_path):
    kind = pa.list_(pa.list_(pa.float32()))
    boxes = pa.array([[[0, 0, 4, 4, 1]], []], kind)
    pq.write_table(pa.table({"image": [b"a", b"b"], "target": boxes}), tmp_path / "t.parquet")
    found = guessed_task(tmp_path / "t.parquet", is_language_model=False)
    assert found == {"kind": "detection", "image": "image", "answer": "target"} | {
        "classes": ["0", "1"]
    }


def test_what_it_writes_loads_and_marks_its_guesses(cli, tmp_path):
    data = tmp_path / "my data"
    data.mkdir()
    lines(data / "year.jsonl", *({"text": f"a{n}", "target": n + 0.5} for n in range(40)))
    lines(data / "poems.jsonl", *({"text": f"a{n}"} for n in range(40)))
    adapters = [save_lora(tmp_path / name, seed) for seed, name in enumerate(("lora-year", "x"))]
    code, _, err = cli("init", data, *adapters)
    assert code == 0, err
    assert "warning: x: no data of that name" in err
    assert "warning: poems: no adapter of that name" in err
    recipe = load_recipe(PipelineRecipe, data / "pipeline.yaml")
    assert {ref.name: ref.path for ref in recipe.adapters} == {
        "year": str(adapters[0]),
        "x": str(adapters[1]),
    }
    assert (recipe.suite, recipe.methods) == (str(data), None)
    assert recipe.budget is not None
    text = (data / "suite.yaml").read_text()
    tasks = yaml.safe_load(text)["tasks"]
    assert tasks["year"] == {"kind": "regression", "text": "text", "answer": "target"}
    suite = find_suite(str(data))
    assert suite.base == "tiny"
    assert {name: task.kind for name, task in suite.tasks.items()} == {
        "year": "regression",
        "poems": "classification",
    }
    assert suite.tasks["year"].labelled
    assert not suite.tasks["poems"].labelled
    assert all(GUESS in line for line in text.splitlines() if line.startswith("    "))
    code, _, err = cli("init", data, *adapters)
    assert code == 2
    assert err.count("exists") == 2


def test_a_folder_without_data_is_refused(cli, tmp_path):
    code, _, err = cli("init", tmp_path, save_lora(tmp_path / "a"))
    assert code == 3
    assert "no data" in err
