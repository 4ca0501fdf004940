"""Ray alone: actors, tasks, sessions, Tune and Train around serial functions of other rooms.

Nothing else imports Ray, and every file here does.
"""

import os
import secrets

# Ray reads these once, when it is imported, so they stand here before any module imports it. A
# cluster we start ourselves is closed to everybody else by a token that lives in this process
# and its children alone; Ray's own default writes a token file that every local user can read.
if "RAY_ADDRESS" not in os.environ and "RAY_AUTH_MODE" not in os.environ:
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# By default Ray hides GPUs from workers that ask for none and warns that it will stop doing so.
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
