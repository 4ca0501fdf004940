"""`icm-ray plan`: what a job that runs a base will do and need, before any spend."""

from icm_ray.workflows.plan.jobs import plan

__all__ = ["plan"]
