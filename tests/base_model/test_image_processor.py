"""Images beside texts: their places, tokens and pixels, as the model's own code has them."""

import io
from base64 import b64encode

import numpy as np
import pytest
import torch
from base_samples import IMAGE
from PIL import Image

from icm_ray.base_model.decoding import answered, greedy, readout_of
from icm_ray.base_model.loading import Base, load_base, load_reader
from icm_ray.base_model.readers import Answered, TextReader, join
from icm_ray.base_model.states import hidden_states
from icm_ray.errors import InputError
from icm_ray.inputs import PLACE, Prompt, Turn

DRAW = np.random.default_rng(0)


def image(height: int = 40, width: int = 30) -> str:
    file = io.BytesIO()
    Image.fromarray(DRAW.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "PNG")
    return b64encode(file.getvalue()).decode()


def opened(one: str) -> Image.Image:
    from base64 import b64decode

    return Image.open(io.BytesIO(b64decode(one)))


ONE, OTHER = image(), image(28, 28)


def asked(content: str, *images: str, chat: bool = False, **more) -> Prompt:
    return Prompt((Turn("user", content),), chat, images=images, **more)


@pytest.fixture(scope="module")
def base(tiny_llava) -> Base:
    return load_base(tiny_llava)


@pytest.fixture
def reader(tiny_llava) -> TextReader:
    made = load_reader(tiny_llava)
    assert isinstance(made, TextReader)
    return made


def read(reader: TextReader, *prompts: Prompt, limit: int = 100) -> list[list[int]]:
    return [list(ids) for ids in reader.read(prompts, limit)]


def ids(reader: TextReader, text: str) -> list[int]:
    return reader.tokenizer(text, add_special_tokens=False)["input_ids"]


SHOWN = " ".join([IMAGE] * 4)


def test_a_model_sees_what_its_own_processor_gives_it(base, tiny_llava) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    prompts = [asked(f"{PLACE} the sun", ONE), asked(f"of {PLACE} moon {PLACE}", OTHER, ONE)]
    batch = base.reader.batch(base.reader.read(prompts, 100), [0, 1])
    processor = AutoProcessor.from_pretrained(tiny_llava)
    wanted = processor(
        text=[f"{IMAGE} the sun", f"of {IMAGE} moon {IMAGE}"],
        images=[[opened(ONE)], [opened(OTHER), opened(ONE)]],
        return_tensors="pt",
        padding=True,
        padding_side="right",
    )
    assert batch.ids.tolist() == wanted["input_ids"].tolist()
    torch.testing.assert_close(batch.pixels, wanted["pixel_values"])
    whole = AutoModelForImageTextToText.from_pretrained(tiny_llava).eval()
    given = {name: wanted[name] for name in ("input_ids", "attention_mask", "pixel_values")}
    with torch.no_grad():
        expected = whole(**given).logits
        logits = readout_of(base)(hidden_states(base.model, batch))
    torch.testing.assert_close(logits[batch.mask], expected[batch.mask])


def test_greedy_answers_are_those_of_generate(base) -> None:
    prompts = [asked(f"{PLACE} the sun", ONE), asked(f"of the old {PLACE} moon", OTHER)]
    batch = base.reader.batch(base.reader.read(prompts, 100), [0, 1])
    said = greedy(base.model, readout_of(base), batch, 5)
    blind = []
    for row in range(2):
        one = base.reader.batch(base.reader.read(prompts, 100), [row])
        expected = base.whole.generate(
            **one.inputs, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None,
            bad_words_ids=[[base.reader.processor.token_id]],
        )  # fmt: skip
        assert said[row] == expected[0, one.ids.shape[1] :].tolist()
        black = torch.zeros_like(one.pixels)
        other = base.whole.generate(
            **{**one.inputs, "pixel_values": black}, max_new_tokens=5, do_sample=False,
            pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        blind.append(other[0, one.ids.shape[1] :].tolist())
    assert said != blind, "the image decides"
    (taught,) = answered(base.model, readout_of(base), [batch], 5, None)
    assert taught.pixels is batch.pixels
    assert taught.answers.sum(1).tolist() == [5, 5]


def test_a_chat_template_places_images_as_parts_or_as_words(reader) -> None:
    talk = asked(f"{PLACE}the sun", ONE, chat=True, room=4)
    expected = ids(reader, f"[CLS] {SHOWN} the sun [SEP] [CLS]")
    assert read(reader, talk) == [expected]
    # Words alone go through it as well, though its contents are lists.
    assert read(reader, asked("the sun", chat=True)) == [ids(reader, "[CLS] the sun [SEP]")]
    reader.tokenizer.chat_template = (
        "{% for turn in messages %}[CLS] {{ turn.content }} [SEP] {% endfor %}[CLS]"
    )
    assert read(reader, talk) == [expected]
    reader.tokenizer.chat_template = (
        "{% for turn in messages %}{% for part in turn.content %}{{ part.text }}"
        "{% endfor %}{% endfor %}"
    )
    with pytest.raises(InputError, match=r"1 images but 0 times '<image>' .* has no place"):
        read(reader, talk)


def test_a_long_prompt_loses_words_and_no_image(reader) -> None:
    long = asked(f"of and moon {PLACE} river stone", ONE)
    (kept,) = read(reader, long, limit=8)
    assert kept == [2, *ids(reader, f"{SHOWN} river stone"), 3]
    assert reader.overlong([long], 8) == [0]
    with pytest.raises(InputError, match="images of 4 tokens but a row has at most 4"):
        read(reader, long, limit=4)


def test_pixels_ride_along(reader) -> None:
    said = asked(f"{PLACE} the sun", ONE, said="bright cold")
    plain = asked("the moon", said="cold")
    batch = reader.batch(reader.read([said, plain], 100), [1, 0])
    assert isinstance(batch, Answered)
    assert batch.pixels is not None
    assert batch.pixels.shape == (1, 3, 28, 28)
    counted = batch.ids[1, 1:][batch.answers[1, :-1]]
    assert counted.tolist() == ids(reader, "bright cold [SEP]")
    both = join([batch, reader.batch(reader.read([plain], 100), [0])])
    assert both.pixels is not None
    assert both.pixels.shape == (1, 3, 28, 28)


def test_what_cannot_be_read_is_said(reader, tiny_llama) -> None:
    with pytest.raises(InputError, match="number 0 holds '<image>', which stands for an image"):
        reader.read([f"the {IMAGE} sun"], 100)
    with pytest.raises(InputError, match="1 images but 2 times '<image>'"):
        read(reader, asked(f"{PLACE} the {IMAGE}", ONE))
    with pytest.raises(InputError, match="the base has no vision tower, or no processor"):
        load_reader(tiny_llama).read([asked(f"{PLACE} the sun", ONE)], 100)
    own = reader.processor.own
    own.image_processor.model_input_names = ["pixel_values", "image_sizes"]
    with pytest.raises(InputError, match="its processor gives image_sizes beside images"):
        read(reader, asked(f"{PLACE} the sun", ONE))
