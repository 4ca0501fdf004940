"""Fetch a suite's base model once, check it, and show what data the suite has.

python -m jobs.prepare -c configs/prepare/text.yaml [key=value ...]
"""

from icm_ray.jobs import JOBS

work = JOBS["prepare"]

if __name__ == "__main__":
    work.main(__doc__)
