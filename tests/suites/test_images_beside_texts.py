"""Images beside texts in a user's suite: where they stand, and what each mistake is told in."""

import base64
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from test_user_suite import problems_of, write

from icm_ray.inputs import PLACE, Prompt, Turn
from icm_ray.suites import SPLITS, checked_suite

ALL_TEST = {"splits": {split: 4 if split == "test" else 0 for split in SPLITS}}
ASKED = {"kind": "generation", "image": "picture", "prompt": "{picture} What is {it}?", **ALL_TEST}


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Four images beside the table, by their names."""
    names = [f"{number}.png" for number in range(4)]
    for number, name in enumerate(names):
        Image.new("RGB", (8 + number, 8), (number, 0, 0)).save(tmp_path / name)
    return names


def rows_of(files: list[str], **more: Any) -> list[dict[str, Any]]:
    return [
        {"picture": name, "it": str(i), "answer": f"a{i}", **more} for i, name in enumerate(files)
    ]


def in_base64(folder: Path, *names: str) -> tuple[str, ...]:
    return tuple(base64.b64encode((folder / name).read_bytes()).decode() for name in names)


def by_document(folder: Path) -> list[Prompt]:
    found = checked_suite(folder).load("mood", "test")
    assert found.images is None
    return [text for _, text in sorted(zip(found.answers, found.texts, strict=True))]


def test_a_prompt_says_where_the_image_stands(tmp_path: Path, files) -> None:
    found = by_document(write(tmp_path, ASKED, rows_of(files)))
    turn = Turn("user", f"{PLACE} What is 2?")
    assert found[2] == Prompt((turn,), room=128, images=in_base64(tmp_path, files[2]))
    before = checked_suite(tmp_path).fingerprint("mood")
    Image.new("RGB", (9, 9)).save(tmp_path / files[0])
    assert checked_suite(tmp_path).fingerprint("mood") != before
    # Another image is another row, though the words are the same.
    same = [{**row, "it": "it"} for row in rows_of(files)]
    assert checked_suite(write(tmp_path, ASKED, same)).count("mood", "test") == 4


def test_columns_hold_one_image_or_several(tmp_path: Path, files) -> None:
    rows = [{**row, "others": files[:2]} for row in rows_of(files)]
    task = {**ASKED, "image": ["picture", "others"], "prompt": "{others} or {picture}: {it}?"}
    found = by_document(write(tmp_path, task, rows))
    assert found[3].turns[0].content == f"{PLACE}{PLACE} or {PLACE}: 3?"
    assert found[3].images == in_base64(tmp_path, files[0], files[1], files[3])


def test_bytes_of_parquet_and_every_kind_of_prompt(tmp_path: Path, files) -> None:
    write(tmp_path, {**ASKED, "kind": "multiple_choice"}, [])
    (tmp_path / "mood.jsonl").unlink()
    rows = [
        {**row, "picture": (tmp_path / row["picture"]).read_bytes(), "choices": ["x", "y"]}
        for row in rows_of(files)
    ]
    for row in rows:
        row["answer"] = "y"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "mood.parquet")
    test = checked_suite(tmp_path).load("mood", "test")
    assert test.targets.tolist() == [1.0] * 4
    assert {text.choices for text in test.texts} == {("x", "y")}
    assert {text.images for text in test.texts} == {in_base64(tmp_path, name) for name in files}


def talk(part: dict[str, str], number: int = 0) -> list[dict[str, Any]]:
    asked = [part, {"type": "text", "text": f"what? {number}"}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": f"a{number}"}]


def test_parts_of_messages_hold_images_or_stand_for_a_column_s(tmp_path: Path, files) -> None:
    plain = {"kind": "generation", "messages": "talk", **ALL_TEST}
    own = [{"talk": talk({"type": "image", "path": f}, i)} for i, f in enumerate(files)]
    beside = [{"talk": talk({"type": "image"}, i), "seen": [f]} for i, f in enumerate(files)]
    expected = Prompt(
        (Turn("user", f"{PLACE}what? 1"),), True, room=128, images=in_base64(tmp_path, files[1])
    )
    assert by_document(write(tmp_path, plain, own))[1] == expected
    assert by_document(write(tmp_path, {**plain, "image": "seen"}, beside))[1] == expected
    likely = {**plain, "kind": "language_modelling"}
    (text, *_) = checked_suite(write(tmp_path, likely, own)).load("mood", "test").texts
    assert text.said in {"a0", "a1", "a2", "a3"}
    told = problems_of(write(tmp_path, plain, beside))
    assert "line 1: talk: 1 places for images but 0 of them in the row" in told[0]


def test_every_wrong_image_is_told_with_line_and_column(tmp_path: Path, files) -> None:
    rows = rows_of(files)
    rows[0]["picture"], rows[1]["picture"], rows[2]["picture"] = None, "nowhere.png", "../x.png"
    rows[3]["it"] = f"a {PLACE}"
    path = tmp_path / "mood.jsonl"
    told = problems_of(write(tmp_path, ASKED, rows))
    assert told == [
        f"{path}: line 1: picture: null but an image's bytes or path is expected. Mend the line.",
        f"{path}: line 2: picture: 'nowhere.png': no file in the table's folder but an image is "
        "expected. Put it there.",
        f"{path}: line 3: picture: '../x.png': no file in the table's folder but an image is "
        "expected. Put it there.",
        f"{path}: line 4: prompt: U+FFFC, which stands for an image, in a text, or an image in "
        "the answer. Take it out.",
    ]
    for name in files[2:]:
        (tmp_path / name).write_bytes(b"no image")
    suite = checked_suite(write(tmp_path, ASKED, rows_of(files)))
    with pytest.raises(Exception, match="line 3: no readable image") as caught:
        suite.load("mood", "test")
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"prompt": "What is {it}?"}, "prompt: no place for 'picture', a column of images"),
        ({"image": "pictur"}, "image: no column 'pictur'. Did you mean 'picture'?"),
        ({"prompt": None, "text": "it"}, "text and image but one of them is read"),
        ({"prompt": None, "image": ["picture"]}, "image: a list but one column is read without"),
        ({"prompt": None, "kind": "multiple_choice"}, "multiple_choice needs a prompt or messages"),
    ],
)
def test_each_mistake_of_the_file_is_named(tmp_path: Path, files, task, said) -> None:
    own = {key: value for key, value in {**ASKED, **task}.items() if value is not None}
    told = problems_of(write(tmp_path, own, rows_of(files)))
    assert any(said in line for line in told), told
