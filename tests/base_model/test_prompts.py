"""What a model is asked, as tokens: chat templates, pairs, answers, and what a long row loses."""

import pytest

from icm_ray.base_model.loading import load_reader
from icm_ray.base_model.prompts import answer_ids, end_of
from icm_ray.base_model.readers import Answered, TextReader, join
from icm_ray.errors import InputError
from icm_ray.inputs import Pair, Prompt, Question, Turn

TEMPLATE = (
    "{% for turn in messages %}[CLS] {{ turn.content }} [SEP] {% endfor %}"
    "{% if add_generation_prompt %}[CLS] {% endif %}"
)
TURNS = (Turn("system", "the sun"), Turn("user", "of and moon river"))


@pytest.fixture
def reader(tiny_llama) -> TextReader:
    made = load_reader(tiny_llama)
    assert isinstance(made, TextReader)
    made.tokenizer.chat_template = TEMPLATE
    return made


def ids(reader: TextReader, text: str) -> list[int]:
    return reader.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_turns_go_through_the_tokenizers_own_template(reader) -> None:
    asked, whole = (Prompt(TURNS, True, room=room) for room in (4, 0))
    read = reader.read([asked, whole], 100)
    assert read[0] == ids(reader, "[CLS] the sun [SEP] [CLS] of and moon river [SEP] [CLS]")
    assert read[1] == read[0][:-1]  # nobody is to speak next


def test_a_long_prompt_loses_its_oldest_part_behind_the_systems_turn(reader) -> None:
    read = reader.read([Prompt(TURNS, True, room=4)], 9)
    assert read[0] == ids(reader, "[CLS] the sun [SEP] [CLS] moon river [SEP] [CLS]")
    assert reader.overlong([Prompt(TURNS, True), "the sun"], 8) == [0]
    (plain,) = reader.read([Question("of and moon river", 4)], 4)
    assert plain == [2, *ids(reader, "moon river"), 3]
    assert reader.read(["of and moon river"], 4)[0] == [2, *ids(reader, "of and"), 3]


def test_the_models_own_length_leaves_room_for_the_answer(reader) -> None:
    short = TextReader(reader.tokenizer, longest=10)
    assert len(short.read([Prompt(TURNS, True, room=3)], 100)[0]) == 7
    assert len(short.read([Question("the sun " * 9, 4)], 100)[0]) == 6


def test_an_answer_ends_as_the_template_ends_a_turn(reader) -> None:
    tokenizer = reader.tokenizer
    assert end_of(tokenizer, chat=True) == 3
    tokenizer.chat_template = TEMPLATE.replace("[SEP]", "stone")
    assert end_of(tokenizer, chat=True) == ids(reader, "stone")[0]
    assert end_of(tokenizer, chat=False) == 3
    said = answer_ids(tokenizer, Prompt(TURNS, True), "bright dark cold", 3)
    assert said == ids(reader, "bright dark stone")


def test_what_is_said_counts_alone(reader) -> None:
    said = Prompt(TURNS, True, said="bright cold")
    batch = reader.batch(reader.read([said, said], 100), [0, 1])
    assert isinstance(batch, Answered)
    counted = batch.ids[0, 1:][batch.answers[0, :-1]]
    assert counted.tolist() == ids(reader, "bright cold [SEP]")


def test_a_pair_says_which_text_a_token_is_of(tiny_bert) -> None:
    reader = load_reader(tiny_bert)
    assert isinstance(reader, TextReader)
    kinds = {"input_ids": [[2, 5, 3, 6, 3]], "token_type_ids": [[0, 0, 0, 1, 1]]}

    def tokenizer(*texts, **_options):
        return {name: values[0] for name, values in kinds.items()} if len(texts) > 1 else None

    tokenizer.pad_token_id = 0
    paired = TextReader(tokenizer)
    batch = paired.batch(paired.read([Pair("sun", "moon")], 8), [0])
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]
    both = join([batch, reader.batch(reader.read(["the sun of moon river"], 9), [0])])
    assert both.segments is not None
    assert both.segments.sum(1).tolist() == [2, 0]


def test_chats_need_a_template_and_one_that_takes_them(reader) -> None:
    reader.tokenizer.chat_template = "{{ raise_exception('no system, please') }}"
    with pytest.raises(InputError, match=r"refuses turns of system, user .*no system, please"):
        reader.read([Prompt(TURNS, True)], 9)
    reader.tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        reader.read([Prompt(TURNS, True)], 9)
