"""Into a cluster: somebody's at RAY_ADDRESS, or a local one of our own that nobody else reaches."""

import logging
import os
import socket
from pathlib import Path

import ray
import ray.exceptions
from ray._private.runtime_env.constants import RAY_JOB_CONFIG_JSON_ENV_VAR

from icm_ray.config import INSECURE_VARIABLE, Resources
from icm_ray.errors import ClusterError, RecipeError

JOIN_SECONDS = 15.0

log = logging.getLogger(__name__)


def join(address: str) -> None:
    """Join the cluster at `address`.

    Raises:
        RecipeError: it is used without authentication, from outside, and nobody allowed that.
        ClusterError: it does not answer, or turns us away.
    """
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        _warn_of_shown_token()
    else:
        _refuse_open_cluster(address)
    _refuse_silence(address)
    try:
        ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = str(error).partition("\n")[0]
        raise ClusterError(
            f"RAY_ADDRESS: {address}: cannot be joined ({type(error).__name__}: {reason}). Check "
            "that the cluster runs and that RAY_AUTH_MODE and its token are the cluster's own."
        ) from None


def start_local(resources: Resources) -> None:
    """Start a Ray that asks for a token, listens on the loopback interface and ends with us.

    Raises:
        ClusterError: it does not come up, as on a machine that is too busy.
    """
    cpus = os.cpu_count() or 1
    wanted = (resources.workers or 1) * resources.cpus_per_worker
    try:
        ray.init(
            address="local",
            num_cpus=max(cpus, int(wanted)),
            include_dashboard=False,
            logging_level=logging.WARNING,
            _node_ip_address="127.0.0.1",
        )
    except Exception as error:  # Ray has no class of its own for this
        reason = str(error).partition("\n")[0]
        raise ClusterError(
            f"Ray: no local cluster came up ({type(error).__name__}: {reason}). Nothing was done; "
            "run the same command again, on a less busy machine if it goes on."
        ) from error


def _refuse_open_cluster(address: str) -> None:
    """Raise RecipeError unless this process is inside already, or a user opened the door by name.

    Whoever reaches the ports of such a cluster can run code in our workers, and it in ours.
    """
    allowed = os.environ.get(INSECURE_VARIABLE, "").lower() in ("1", "true", "yes")
    if not allowed and RAY_JOB_CONFIG_JSON_ENV_VAR not in os.environ:
        raise RecipeError(
            f"RAY_ADDRESS: {address}: no token (RAY_AUTH_MODE=token) but a cluster that asks for "
            "one is expected, as anyone who reaches an open one can run code. Start it with a "
            f"token, or accept that with --insecure-cluster or {INSECURE_VARIABLE}=1."
        )
    log.warning(
        "The cluster is used without token authentication: anyone who reaches it can run code. "
        "Start it with RAY_AUTH_MODE=token."
    )


def _warn_of_shown_token() -> None:
    """Warn if other users of this machine can read the token, as Ray's own default lets them."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if path.is_file() and path.stat().st_mode & 0o077:
        log.warning("%s: a token that other users can read. Run chmod 600 on it.", path)


def _refuse_silence(address: str) -> None:
    """Raise ClusterError if nobody listens there: Ray itself would go on asking for minutes."""
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdigit():  # "auto" is Ray's to find
        return
    try:
        socket.create_connection((host, int(port)), timeout=JOIN_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"RAY_ADDRESS: {address}: nobody answers ({error.strerror or error}) but a running "
            "cluster is expected. Start it, or unset RAY_ADDRESS for a local one."
        ) from None
