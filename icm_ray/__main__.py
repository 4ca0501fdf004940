"""`python -m icm_ray` is `icm-ray`."""

from icm_ray.cli import main

if __name__ == "__main__":
    main()
