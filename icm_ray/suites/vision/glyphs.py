"""Letters in real typefaces: what letter it is, what kind of typeface, how far it is turned."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from icm_ray.seeding import seed_for
from icm_ray.suites.vision import LETTERS, STYLES
from icm_ray.suites.vision.painting import Painted
from icm_ray.suites.vision.photographs import Photographs

SIDE = 56
MOST_DEGREES = 60.0
"""A letter of the rotation task is turned by up to this, either way."""

TYPEFACES: Mapping[str, Sequence[str]] = {
    "serif": [
        "AccanthisADFStd-Regular.otf",
        "Arapey-Regular.otf",
        "BaskervaldADFStd.otf",
        "Caladea-Regular.ttf",
        "Cardo104s.ttf",
        "DejaVuSerif.ttf",
        "EBGaramond12-Regular.otf",
        "Essays1743.ttf",
        "Fanwood.otf",
        "GenBasR.ttf",
        "GoudyBookletter1911.otf",
        "LiberationSerif-Regular.ttf",
        "LinLibertine_R.otf",
        "OldStandard-Regular.ttf",
        "Prociono.otf",
        "Quattrocento-Regular.otf",
        "Vollkorn-Regular.ttf",
    ],
    "sans": [
        "Cabin-Regular.otf",
        "Cantarell-Regular.otf",
        "ClearSans-Regular.ttf",
        "Comfortaa-Regular.ttf",
        "DejaVuSans.ttf",
        "Dosis-Book.otf",
        "GilliusADF-Regular.otf",
        "Go-Regular.ttf",
        "Junction.otf",
        "Jura-Regular.otf",
        "Karla-Regular.otf",
        "Lato-Regular.ttf",
        "LiberationSans-Regular.ttf",
        "OpenSans-Regular.ttf",
        "Play-Regular.ttf",
        "Quicksand-Regular.ttf",
        "UniversalisADFStd-Regular.otf",
    ],
    "mono": [
        "Anonymous_Pro.ttf",
        "Courier_Prime.otf",
        "DejaVuSansMono.ttf",
        "FantasqueSansMono-Regular.ttf",
        "FiraCode-Regular.ttf",
        "GNUTypewriter.ttf",
        "Go-Mono.ttf",
        "Hack-Regular.ttf",
        "Inconsolata.otf",
        "JetBrainsMono-Regular.ttf",
        "LeagueMono-Regular.otf",
        "LiberationMono-Regular.ttf",
        "OCRB.otf",
        "agave-r-autohinted.ttf",
        "monof55.ttf",
        "mononoki-Regular.ttf",
    ],
    "hand": [
        "BecauseWeBuild-Regular.otf",
        "BecauseWeCreate-Regular.otf",
        "BecauseWeLearn-Regular.otf",
        "Breip.ttf",
        "DancingScript-Regular.otf",
        "Delphine.ttf",
        "Ecolier-court.ttf",
        "Humor-Sans.ttf",
        "KaushanScript-Regular.otf",
        "Kristi.ttf",
        "LeckerliOne-Regular.ttf",
        "LobsterTwo-Regular.otf",
        "Rufscript010.ttf",
        "SteveHand.ttf",
        "dkg.ttf",
        "femkeklaver.ttf",
    ],
}
"""Font files by kind; a blank in a name is written as an underscore."""

DEAL = ("test", "train", "calibration", "train", "validation", "train")
"""Splits of a kind's typefaces, over and over, in a shuffled order."""


def typefaces(split: str) -> Mapping[str, Sequence[str]]:
    """Return the font files of a split, by kind; each is in one split, in every task alike."""
    held = {}
    for kind, names in TYPEFACES.items():
        shuffled = sorted(names, key=lambda name: seed_for("typeface", name))
        held[kind] = [n for i, n in enumerate(shuffled) if DEAL[i % len(DEAL)] == split]
    return held


class Glyphs:
    """Paints the three glyph tasks for one split.

    Args:
        split: One of the four splits.
        fonts: Folder below which the font files are.
        photographs: The same split's, for backgrounds.
    """

    def __init__(self, split: str, fonts: Path, photographs: Photographs) -> None:
        self.split = split
        self.photographs = photographs
        self.faces = {k: [_find(fonts, n) for n in names] for k, names in typefaces(split).items()}

    def letters(self, count: int) -> Iterator[Painted]:
        """Yield lower-case letters with their place in the alphabet."""
        for number in range(count):
            rng = self._rng("letter", number)
            target = number % len(LETTERS)
            face = self.face(rng)
            image = self._paint(rng, LETTERS[target], face, rng.uniform(-25, 25))
            yield Painted(image, target, face.name)

    def styles(self, count: int) -> Iterator[Painted]:
        """Yield three letters each with the kind of their typeface."""
        for number in range(count):
            rng = self._rng("typeface", number)
            target = number % len(STYLES)
            face = self.face(rng, STYLES[target])
            text = "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=3))
            image = self._paint(rng, text, face, rng.uniform(-10, 10))
            yield Painted(image, target, face.name)

    def rotations(self, count: int) -> Iterator[Painted]:
        """Yield letters with the degrees they are turned by, anticlockwise."""
        for number in range(count):
            rng = self._rng("rotation", number)
            face = self.face(rng)
            degrees = round(float(rng.uniform(-MOST_DEGREES, MOST_DEGREES)), 2)
            letter = LETTERS[rng.integers(len(LETTERS))]
            yield Painted(self._paint(rng, letter, face, degrees), degrees, face.name)

    def _rng(self, task: str, number: int) -> np.random.Generator:
        return np.random.default_rng(seed_for("glyphs", task, self.split, number))

    def face(self, rng: np.random.Generator, kind: str | None = None) -> Path:
        """Return one of the split's typefaces, of a kind or of any."""
        faces = self.faces[kind or STYLES[rng.integers(len(STYLES))]]
        return faces[rng.integers(len(faces))]

    def _paint(
        self, rng: np.random.Generator, text: str, face: Path, degrees: float
    ) -> Image.Image:
        """Return dark text on a light photograph, or light on dark, both in grey."""
        mask = mask_of(text, face, degrees, round(SIDE * rng.uniform(0.55, 0.85)))
        light = ground_of(rng, self.photographs, SIDE)
        place = [round(rng.uniform(0, SIDE - length)) for length in mask.size]
        ink = Image.new("L", (SIDE, SIDE))
        ink.paste(mask, (place[0], place[1]))
        return inked(rng, light, ink)


def ground_of(rng: np.random.Generator, photographs: Photographs, side: int) -> np.ndarray:
    """Return a light crop of a photograph, grey in [0, 1], `(side, side)`."""
    ground = np.asarray(photographs.crop(rng, side).convert("L"), dtype=np.float64) / 255
    return 1 - (1 - ground) * rng.uniform(0.25, 0.6)


def inked(rng: np.random.Generator, light: np.ndarray, ink: Image.Image) -> Image.Image:
    """Return a light ground with dark ink on it, or half of the time the negative, in grey."""
    cover = np.asarray(ink, dtype=np.float64) / 255 * rng.uniform(0.6, 1.0)
    grey = light * (1 - cover) + 0.1 * cover
    grey = 1 - grey if rng.random() < 0.5 else grey
    return Image.fromarray(np.rint(255 * grey).astype(np.uint8))


@cache
def _find(fonts: Path, name: str) -> Path:
    found = sorted(p for p in fonts.rglob("*") if p.name.replace(" ", "_") == name)
    if not found:
        raise FileNotFoundError(f"{fonts}: no {name}")
    return found[0]


def mask_of(text: str, face: Path, degrees: float, longest: int) -> Image.Image:
    """Return turned text, white on black, cropped to its ink and `longest` pixels at most."""
    canvas = Image.new("L", (512, 512))
    font = ImageFont.truetype(face, 110, layout_engine=ImageFont.Layout.BASIC)
    ImageDraw.Draw(canvas).text((256, 256), text, 255, font, anchor="mm")
    turned = canvas.rotate(degrees, Image.Resampling.BICUBIC)
    box = turned.getbbox()
    if box is None:
        raise ValueError(f"{face}: no ink for {text!r}")
    ink = turned.crop(box)
    scale = longest / max(ink.size)
    size = [max(1, round(length * scale)) for length in ink.size]
    return ink.resize((size[0], size[1]), Image.Resampling.LANCZOS)
