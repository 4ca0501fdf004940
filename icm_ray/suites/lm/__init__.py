"""The language-modelling suite: six kinds of text on one small decoder.

Each example is a window of 900 characters, read as its first 128 tokens: source code, a novel,
speeches, mail, a dictionary, and German. An adapter of one domain makes most others worse, so
merges have something to reconcile. Sources and licences: `data/README.md`.
"""

from pathlib import Path

from icm_ray.suites.opening import open_suite

LM = open_suite(Path(__file__).parent, is_packaged=True)
"""The suite, as `suite.yaml` says; `icm_ray.suites.SUITES` lists it under its name."""
