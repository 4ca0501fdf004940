"""The text suite: six real tasks on one small sentence encoder.

Three classifications and three regressions over dictionary glosses, source code, speeches and
spelling. None can be read off a bag of words alone, so an adapter has something to learn. They
pull one encoder in different directions, and a shifted scale ruins a regression while it leaves
an arg-max alone. Sources and licences: `data/README.md`.
"""

from pathlib import Path

from icm_ray.suites.opening import open_suite

TEXT = open_suite(Path(__file__).parent, is_packaged=True)
"""The suite, as `suite.yaml` says; `icm_ray.suites.SUITES` lists it under its name."""
