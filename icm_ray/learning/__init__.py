"""Learned merging: what is learned x what is minimised x where it starts, and one loop."""
