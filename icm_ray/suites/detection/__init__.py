"""The detection suite: four families of things to find, on one small vision transformer.

Solids and furniture stand in rendered rooms, letters and handwritten digits lie on photographs.
Two families share their pictures' kind, and each task's pictures show things of the other family
that are none of its own: an expert finds its family and leaves the other alone. Sources and
licences: `data/README.md`.
"""

from pathlib import Path

from icm_ray.suites.opening import open_suite

DETECTION = open_suite(Path(__file__).parent, is_packaged=True)
"""The suite, as `suite.yaml` says; `icm_ray.suites.SUITES` lists it under its name."""

SOLIDS, FURNITURE, LETTERS, DIGITS = (
    DETECTION.tasks[name].classes for name in ("solids", "furniture", "letters", "digits")
)
SIDE = 112
"""Of a picture in pixels: eight patches of DINOv2."""
