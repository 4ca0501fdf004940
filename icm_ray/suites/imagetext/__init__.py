"""The imagetext suite: questions about pictures, answered in words by a small LLaVA.

Rooms are rendered, so that what is in them is known exactly; numbers are written in real
typefaces; photographs are real, and spoilt in a known way. Five tasks ask different things of the
same rooms. Sources and licences: `data/README.md`.
"""

from pathlib import Path

from icm_ray.suites.opening import open_suite

IMAGETEXT = open_suite(Path(__file__).parent, is_packaged=True)
"""The suite, as `suite.yaml` says; `icm_ray.suites.SUITES` lists it under its name."""
