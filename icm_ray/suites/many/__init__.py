"""The many suite: twenty unlike tasks on one small sentence encoder, eight of them on two texts.

Classification and regression over dictionary entries, spelling and sound, dates and numerals,
code and speeches. A document (a synset, a stem, a file, a speech, a date) is in the same split in
every task, so no expert trains on what another is tested on. Sources and licences:
`data/README.md`.
"""

from pathlib import Path

from icm_ray.suites.opening import open_suite

MANY = open_suite(Path(__file__).parent, is_packaged=True)
"""The suite, as `suite.yaml` says; `icm_ray.suites.SUITES` lists it under its name."""
