"""The vision suite: seven tasks on one small vision transformer, two of them dense.

Four classifications, a regression, and two maps with one target a patch. Handwritten digits and
photographs are real; letters are drawn in real typefaces, and rooms are rendered, so that what is
in them and how far it is are known exactly. Sources and licences: `data/README.md`.
"""

from pathlib import Path

from icm_ray.suites.opening import open_suite

VISION = open_suite(Path(__file__).parent, is_packaged=True)
"""The suite, as `suite.yaml` says; `icm_ray.suites.SUITES` lists it under its name."""

LETTERS, STYLES, DISTORTIONS, SURFACES = (
    VISION.tasks[name].classes for name in ("letter", "typeface", "distortion", "surface")
)
