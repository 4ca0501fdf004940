"""These tests share one local Ray with the other rooms that need one."""

# Sets the token that closes the cluster, so it comes before Ray itself.
import icm_ray.distributed  # noqa: F401  isort: skip

from ray_fixtures import (  # noqa: F401
    adapters,
    experts,
    on_ray,
    one_thread,
    ray_session,
    tiny_bert,
)
