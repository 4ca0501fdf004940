"""Ray alone: actors, tasks, sessions, Tune and Train around serial functions of other rooms.

Nothing else imports Ray, and every file here does.
"""

import os
import secrets
import sys


def is_joining() -> bool:
    """Say whether RAY_ADDRESS names a cluster; if not, one of our own is started."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


# Ray reads these once, when it is imported, so they stand here before any module imports it. A
# cluster we start ourselves is closed to everybody else by a token that lives in this process
# and its children alone; Ray's own default writes a token file that every local user can read.
if not is_joining():
    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    # Despite its name it holds on Linux too: a node of one machine takes 127.0.0.1 for its own
    # address, and whatever Ray starts there (workers, agents, metrics) listens on that alone.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # Not Ray's, so told apart: gradients of Train's workers. What torch cannot be told is where the
    # store listens at which they meet: on every interface, while a Fusion-VAE trains.
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# By default Ray hides GPUs from workers that ask for none and warns that it will stop doing so.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# What runs out of memory each time would otherwise be tried again for ever.
os.environ.setdefault("RAY_task_oom_retries", "3")
