"""Pictures with something to say of each: rooms, numbers on photographs, spoilt photographs.

The projector is trained on all of them and their captions; the tasks ask for parts of what is known
of a room.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from icm_ray.seeding import seed_for
from icm_ray.suites.imagetext.rooms import COLOURS, KINDS, SIDE, Room
from icm_ray.suites.imagetext.rooms import room as draw_room
from icm_ray.suites.vision.distortions import spoil
from icm_ray.suites.vision.glyphs import Glyphs, ground_of, inked, mask_of
from icm_ray.suites.vision.painting import Painted
from icm_ray.suites.vision.photographs import Photographs

COUNTS = ("one", "two", "three", "four")
DAMAGE = {
    "nothing": "none",
    "blur": "blur",
    "noise": "noise",
    "squares": "pixels",
    "bands": "posterised",
}
"""What spoils a photograph, in a word, and the vision suite's name of it."""
LEAST_CONTRAST = 12
"""Deviation of a crop's grey values: flat sky or table shows no damage at all."""


@dataclass(frozen=True)
class Captioned:
    """A picture, its caption, and what is asked of it by column.

    Args:
        image: `SIDE` pixels wide and high.
        caption: What a captioner should say.
        columns: Questions and answers; of rooms alone.
        document: What it was made from.
        room: The room, if it shows one.
    """

    image: Image.Image
    caption: str
    columns: Mapping[str, str]
    document: str
    room: Room | None = field(default=None, kw_only=True)

    @property
    def painted(self) -> Painted:
        """The example as the builder of tables takes it."""
        return Painted(self.image, dict(self.columns), self.document)


def rooms(split: str, photographs: Photographs, count: int, name: str) -> Iterator[Captioned]:
    """Yield rooms with one to four things; the order of questions is drawn, too."""
    for number in range(count):
        one = draw_room(name, split, number, photographs)
        rng = np.random.default_rng(seed_for("imagetext questions", name, split, number))
        columns = {"caption": caption_of(one), **_questions(rng, one)}
        document = f"{split} {number}"
        yield Captioned(one.image, columns["caption"], columns, document, room=one)


def caption_of(room: Room) -> str:
    """Return what is in a room, from left to right: "a red ball, a blue box and a green box."."""
    named = [f"a {thing}" for thing in room.things]
    return " and ".join([part for part in (", ".join(named[:-1]), named[-1]) if part]) + "."


def _questions(rng: np.random.Generator, room: Room) -> dict[str, str]:
    """Return by column what is asked of a room, and the answer."""
    kinds = [thing.kind for thing in room.things]
    alone = [thing for thing in room.things if kinds.count(thing.kind) == 1]
    one = alone[rng.integers(len(alone))]
    asked, is_there = _asked(rng, room)
    beside_asked, beside = _beside(rng, room)
    return {
        "count": COUNTS[len(room.things) - 1],
        "kind_asked": one.kind,
        "colour": one.colour,
        "thing_asked": asked,
        "exists": "yes" if is_there else "no",
        "several": "yes" if len(room.things) > 1 else "no",
        "beside_asked": beside_asked,
        "beside": beside,
    }


def _asked(rng: np.random.Generator, room: Room) -> tuple[str, bool]:
    """Return a thing, half of the time one of the room's, else with colour or kind changed."""
    there = {str(thing) for thing in room.things}
    thing = room.things[rng.integers(len(room.things))]
    if rng.random() < 0.5:
        return str(thing), True
    nearly = {f"{colour} {thing.kind}" for colour in COLOURS}
    nearly |= {f"{thing.colour} {kind}" for kind in KINDS}
    absent = sorted(nearly - there)
    return absent[rng.integers(len(absent))], False


def _beside(rng: np.random.Generator, room: Room) -> tuple[str, str]:
    """Return a place beside a thing, "left of the red ball", and what is there; or nothing."""
    if len(room.things) == 1:
        return "", ""
    place = int(rng.integers(len(room.things) - 1))
    left, right = room.things[place : place + 2]
    if rng.random() < 0.5:
        return f"left of the {right}", str(left)
    return f"right of the {left}", str(right)


def numbers(split: str, glyphs: Glyphs, count: int, name: str) -> Iterator[Captioned]:
    """Yield numbers of one to three digits in real typefaces, on photographs."""
    for place in range(count):
        rng = np.random.default_rng(seed_for("imagetext", name, split, place))
        digits = "".join(str(digit) for digit in rng.integers(10, size=1 + place % 3))
        face = glyphs.face(rng)
        longest = round(SIDE * rng.uniform(0.5, 0.9) * (0.65, 0.9, 1.0)[len(digits) - 1])
        mask = mask_of(digits, face, rng.uniform(-10, 10), longest)
        left, top = (round(rng.uniform(0, SIDE - length)) for length in mask.size)
        ink = Image.new("L", (SIDE, SIDE))
        ink.paste(mask, (left, top))
        image = inked(rng, ground_of(rng, glyphs.photographs, SIDE), ink).convert("RGB")
        yield Captioned(image, f"the number {digits}.", {}, f"{face.name} {split} {place}")


def photographs(split: str, own: Photographs, count: int, name: str) -> Iterator[Captioned]:
    """Yield crops of photographs, each spoilt in one way or not at all."""
    for place in range(count):
        rng = np.random.default_rng(seed_for("imagetext", name, split, place))
        damage = list(DAMAGE)[place % len(DAMAGE)]
        source = own.names[int(rng.integers(len(own.names)))]
        crop = own.crop(rng, SIDE, source)
        while np.asarray(crop.convert("L")).std() < LEAST_CONTRAST:
            crop = own.crop(rng, SIDE, source)
        image = spoil(crop, DAMAGE[damage], rng)
        yield Captioned(image, f"a photograph with {damage}.", {}, f"{source} {split} {place}")
