"""The imagetext suite: questions about rendered rooms, answered in words by a small LLaVA.

What is in a room is known exactly, and five tasks ask different things of the same rooms. Sources
and licences: `data/README.md`.
"""

from pathlib import Path

from icm_ray.suites.opening import open_suite

IMAGETEXT = open_suite(Path(__file__).parent, is_packaged=True)
"""The suite, as `suite.yaml` says; `icm_ray.suites.SUITES` lists it under its name."""
