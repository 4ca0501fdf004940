"""Entry points: each parses its command line, loads a recipe and calls one function.

Every job runs the same way on a laptop and behind `ray job submit --working-dir . --`.
"""

import icm_ray.interruption  # noqa: F401 - so that Ctrl-C is answered while a job is imported
