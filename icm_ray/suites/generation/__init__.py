"""The generation suite: four kinds of short answers, decoded by one small decoder.

A prompt is one line, `<what is asked>: <about what>`, and the answer is the next one. Every task
asks for a form the base does not give by itself: phones, a dictionary's definition, the form a
dictionary lists a word under, and ISO dates. Sources and licences: `data/README.md`.
"""

from pathlib import Path

from icm_ray.suites.opening import open_suite

GENERATION = open_suite(Path(__file__).parent, is_packaged=True)
"""The suite, as `suite.yaml` says; `icm_ray.suites.SUITES` lists it under its name."""
