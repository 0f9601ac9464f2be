"""The Ray cluster that a stage works on: that of RAY_ADDRESS, or one that starts and ends with the stage."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from pipeline import modules
from pipeline.errors import RequestError, WorkError

_STORE = ("OAPL_CACHE", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")
INHERITED = ("PYTHONPATH", modules.SAFE, modules.OWN, "OMP_", "GOMP_", "TORCHDYNAMO_", "VLLM_", *_STORE)
"""Starts of the names of environment variables that workers on other machines get, too; no secrets, which Ray shows."""


@contextlib.contextmanager
def connected(stage: str) -> Iterator[None]:
    """Connects this process to the cluster and says on standard error where it is; a connection that is there is used.

    Raises RequestError where Ray is not installed or the address can't be used, WorkError where nobody answers.
    """
    ray = _import_ray()
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS", "")
    if address.startswith("ray://"):
        raise RequestError(
            f"RAY_ADDRESS={address}: rollouts are not sent through Ray's client; run on a node of the cluster with "
            "RAY_ADDRESS=auto, or through `ray job submit`"
        )
    try:
        # Ray puts the driver's current folder in front of its workers' path; what lies there is not ours.
        with contextlib.chdir("/"):
            ray.init(
                address=address or "local",
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": _inherited()} if address else None,
            )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:  # Ray's ways to say that nobody is there
        where = f"RAY_ADDRESS={address}" if address else "Ray on this machine"
        raise WorkError(f"{where}: can't be reached or started ({' '.join(str(error).split())[:200]})") from None
    try:
        alive = [node for node in ray.nodes() if node["Alive"]]
        place = ray.get_runtime_context().gcs_address
        what = f"Ray cluster at {place}" if address else f"a Ray cluster of its own at {place}"
        sys.stderr.write(f"{stage}: on {what}, {len(alive)} node{'s' * (len(alive) != 1)}\n")
        yield
    finally:
        ray.shutdown()


def _import_ray() -> Any:
    # Read when Ray is imported: nothing is reported to its makers, and a cluster of our own runs workers as we run,
    # for Ray's niceness of 15 would have programs exceed their time limits where a core is shared.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # the new way; the old one says so in a warning
    try:
        import ray
    except ImportError:
        raise RequestError(
            "engine: ray needs Ray, which is not installed; pip install 'oapl[ray]', or set engine to local"
        ) from None
    return ray


def _inherited() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith(INHERITED)}


def nodes(needs: dict[str, float]) -> dict[str, int]:
    """Ids of the nodes that are alive, each with how many actors or tasks it has room for that need so much."""
    import ray

    alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    rooms = {
        node: min(int(found.get(name, 0) // needed) for name, needed in needs.items()) for node, found in alive.items()
    }
    return {node: room for node, room in rooms.items() if room}


def has_gpus() -> bool:
    return bool(nodes({"GPU": 1}))
