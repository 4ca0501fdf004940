"""Moved to `icm_ray.methods.rebuild`, where the merge method can reach it."""

from icm_ray.methods.rebuild import KINDS, added, bases, combined, positions, rebuild, stacks

__all__ = ["KINDS", "added", "bases", "combined", "positions", "rebuild", "stacks"]
