"""The imagetext suite: splits that share nothing, answers that are true, a base that sees."""

import re
from functools import cache

import numpy as np
import pytest
from PIL import Image

from icm_ray.inputs import pixels
from icm_ray.suites import SPLITS, SUITES, Examples, prepare_base
from icm_ray.suites.assemble_llava import DECODER, PROJECTOR, SIDE, TOWER
from icm_ray.suites.imagetext import pictures
from icm_ray.suites.imagetext.build_images import SIZES
from icm_ray.suites.imagetext.rooms import COLOURS, KINDS, Room, Thing, room
from icm_ray.suites.vision.photographs import Photographs

IMAGETEXT = SUITES["imagetext"]
DATA = IMAGETEXT.folder / "data"
TASKS = sorted(IMAGETEXT.tasks)
MOST_BYTES = 1_600_000


@cache
def load(task: str, split: str) -> Examples:
    """Decode a split once for all tests."""
    return IMAGETEXT.load(task, split)


def asked(examples: Examples) -> list[str]:
    return [text.turns[-1].content for text in examples.texts]  # type: ignore[union-attr]


def decoded(examples: Examples, row: int) -> np.ndarray:
    from base64 import b64decode

    return pixels(b64decode(examples.texts[row].images[0]))  # type: ignore[union-attr]


@pytest.mark.parametrize("task", TASKS)
def test_splits_have_their_sizes_and_share_no_document(task: str) -> None:
    seen: set[str] = set()
    for split in SPLITS:
        examples = load(task, split)
        share = 0.75 if task == "beside" else 1  # a quarter of the rooms holds one thing
        assert len(examples) == SIZES[split] * share
        assert not seen & set(examples.documents)
        seen |= set(examples.documents)
        assert decoded(examples, 0).shape == (SIDE, SIDE, 3)
        assert decoded(examples, 0).std() > 1  # no picture is blank


def test_the_answers_about_a_room_agree_with_its_caption() -> None:
    for split in SPLITS:
        captions = load("caption", split).answers
        things = [re.findall(r"a (\w+) (\w+)", caption) for caption in captions]
        for row, answer in zip(things, load("count", split).answers, strict=True):
            assert pictures.COUNTS.index(answer) == len(row) - 1
        colours = load("colour", split)
        for row, text, answer in zip(things, asked(colours), colours.answers, strict=True):
            kind = re.search(r"is the (\w+)\?", text)[1]
            assert [colour for colour, own in row if own == kind] == [answer]
        exists = load("exists", split)
        for row, text, answer in zip(things, asked(exists), exists.answers, strict=True):
            thing = re.search(r"there a (\w+) (\w+)\?", text).groups()
            assert (thing in row) == (answer == "yes")
        beside = load("beside", split)
        several = [[" ".join(thing) for thing in row] for row in things if len(row) > 1]
        for row, text, answer in zip(several, asked(beside), beside.answers, strict=True):
            side, thing = re.search(r"is (left|right) of the (\w+ \w+)\?", text).groups()
            assert row[row.index(thing) + {"left": -1, "right": 1}[side]] == answer


@pytest.mark.parametrize("task", ["count", "colour", "exists"])
def test_no_answer_is_right_for_most(task: str) -> None:
    answers = list(load(task, "test").answers)
    classes = set(load(task, "train").answers)
    assert set(answers) == classes
    assert max(answers.count(answer) for answer in classes) < 1.6 * len(answers) / len(classes)


def test_the_data_are_small_and_their_licences_are_told() -> None:
    assert sum(path.stat().st_size for path in DATA.glob("*.parquet")) < MOST_BYTES
    assert PROJECTOR.stat().st_size < 2_100_000
    readme = (DATA / "README.md").read_text()
    for name, task in IMAGETEXT.tasks.items():
        assert f"`{name}`" in readme
        assert task.source
        assert task.licence


def some_photographs() -> Photographs:
    """One made-up photograph, as the builders take them."""
    photographs = Photographs.__new__(Photographs)
    noise = np.random.default_rng(0).integers(0, 255, (200, 300, 3), dtype=np.uint8)
    photographs.names = ["noise"]
    photographs.images = {"noise": Image.fromarray(noise)}
    return photographs


def test_a_room_depends_on_nothing_but_its_number() -> None:
    first, second = (room("try", "train", 3, some_photographs()) for _ in range(2))
    assert first.image.tobytes() == second.image.tobytes()
    assert len(first.things) == 4
    assert len({thing.colour for thing in first.things}) == 4
    assert first.image.tobytes() != room("try", "train", 7, some_photographs()).image.tobytes()


def test_things_stand_from_left_to_right_and_a_mirror_turns_them_round() -> None:
    one = room("try", "train", 3, some_photographs())
    for seen in (one, one.mirrored, one.mirrored.mirrored):
        middles = [np.nonzero(seen.rays == place + 2)[1].mean() for place in range(4)]
        assert middles == sorted(middles)
    assert one.mirrored.things == one.things[::-1]
    assert one.mirrored.mirrored.image.tobytes() == one.image.tobytes()


def test_a_caption_names_every_thing_once() -> None:
    things = (Thing("red", "ball"), Thing("blue", "box"), Thing("green", "box"))
    none = np.zeros((2, 2), dtype=int)
    picture = Image.new("RGB", (SIDE, SIDE))
    said = [pictures.caption_of(Room(picture, things[:n], none)) for n in (1, 2, 3)]
    assert said == [
        "a red ball.",
        "a red ball and a blue box.",
        "a red ball, a blue box and a green box.",
    ]
    assert {thing.colour for thing in things} < set(COLOURS)
    assert {thing.kind for thing in things} < set(KINDS)


@pytest.mark.slow  # downloads 180 MB unless the cache holds them
def test_the_base_reads_an_image_as_36_tokens_between_words() -> None:
    import torch
    from safetensors.torch import load_file

    from icm_ray.base_model.loading import load_base
    from icm_ray.base_model.states import hidden_states

    base = load_base(prepare_base("dinov2-smollm2"))
    examples = load("caption", "test").first(2)
    read = base.reader.read(examples.inputs, 64)
    batch = base.reader.batch(read, [0, 1])
    image = base.reader.processor.token_id
    assert [list(ids).count(image) for ids in read] == [36, 36]
    assert batch.pixels.shape == (2, 3, SIDE, SIDE)
    words, tower = (load_base(prepare_base(name)) for name in (DECODER, TOWER))
    with torch.no_grad():
        states = tower.model(batch.pixels, output_hidden_states=True).hidden_states
        shown = torch.cat([states[layer][:, 1:] for layer in (4, 8, -1)], dim=-1)
        own = {name: tensor.float() for name, tensor in load_file(PROJECTOR).items()}
        hidden = shown @ own["linear_1.weight"].T + own["linear_1.bias"]
        seen = torch.nn.functional.gelu(hidden) @ own["linear_2.weight"].T + own["linear_2.bias"]
        embedded = words.model.get_input_embeddings()(batch.ids)
        spliced = embedded.masked_scatter((batch.ids == image)[..., None], seen)
        expected = words.model(inputs_embeds=spliced).last_hidden_state
        torch.testing.assert_close(hidden_states(base.model, batch), expected, rtol=1e-3, atol=1e-3)
