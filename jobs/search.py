"""Search merge methods, their parameters and coefficients with Ray Tune and Optuna.

python -m jobs.search -c configs/search/ties.yaml [key=value ...]

Kill it whenever you like: the same command goes on. best.yaml in the output folder is always the
best merge so far, as a recipe of jobs.merge.
"""

from icm_ray.jobs import JOBS

work = JOBS["search"]

if __name__ == "__main__":
    work.main(__doc__)
