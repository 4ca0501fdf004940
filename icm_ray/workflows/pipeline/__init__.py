"""From a base and its tasks to one proven adapter, stage by stage."""
