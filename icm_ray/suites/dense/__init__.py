"""The dense suite: six maps of the same rooms, on one small vision transformer.

What each patch of a rendered room shows, which way it faces, how much of it is edge, how light, how
far and how high it is. All tasks read the same pictures, so their experts differ in what they say
and not in what they see. Sources and licences: `data/README.md`.
"""

from pathlib import Path

from icm_ray.suites.opening import open_suite

DENSE = open_suite(Path(__file__).parent, is_packaged=True)
"""The suite, as `suite.yaml` says; `icm_ray.suites.SUITES` lists it under its name."""

SURFACES, NORMALS = (DENSE.tasks[name].classes for name in ("surface", "normal"))
