"""Dagster's instance of a data folder: SQLite and logs below `<data>/dagster`, the same for every command."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from pipeline.errors import RequestError
from pipeline.layout import dagster_home
from pipeline.storage.durable import write_durably

if TYPE_CHECKING:
    import dagster as dg

ENGINE_POOL, LEARNER_POOL = "engine", "learner"
"""Steps that hold the same device wait for one another; OAPL_ONE_DEVICE=1 says that there is only one."""
if os.environ.get("OAPL_ONE_DEVICE") == "1":
    ENGINE_POOL = LEARNER_POOL = "device"
IN_ORDER, TWO_AT_ONCE = "oapl/in_order", "oapl/two_at_once"
"""Tags of Dagster's runs, with the name of our run as value, that the queue counts."""
BACKFILL = "dagster/backfill"
"""Dagster's own tag; a backfill that is launched from the assets and not from a job bears none of ours."""


def instance_config(storage: str) -> dict[str, Any]:
    """What `dagster.yaml` says, with everything that is kept below `storage`.

    The file at the top level of the repository says the same with `data/dagster`.
    """
    return {
        "storage": {"sqlite": {"base_dir": storage}},
        "local_artifact_storage": {
            "module": "dagster.core.storage.root",
            "class": "LocalArtifactStorage",
            "config": {"base_dir": storage},
        },
        "compute_logs": {
            "module": "dagster.core.storage.local_compute_log_manager",
            "class": "LocalComputeLogManager",
            "config": {"base_dir": f"{storage}/logs"},
        },
        "concurrency": {
            "pools": {"default_limit": 1, "granularity": "op"},
            "runs": {
                "max_concurrent_runs": 4,
                "tag_concurrency_limits": [
                    {"key": key, "value": {"applyLimitPerUniqueValue": True}, "limit": limit}
                    for key, limit in ((IN_ORDER, 1), (TWO_AT_ONCE, 2), (BACKFILL, 1))
                ],
            },
        },
        "run_monitoring": {
            "enabled": True,
            "start_timeout_seconds": 180,
            "cancel_timeout_seconds": 30,
            "poll_interval_seconds": 10,
            "free_slots_after_run_end_seconds": 10,
            "max_resume_run_attempts": 0,
        },
        "run_retries": {"enabled": True, "max_retries": 0},
        "telemetry": {"enabled": False},
        "nux": {"enabled": False},
    }


def prepare_home(data: Path) -> Path:
    """Makes `<data>/dagster` a DAGSTER_HOME, and returns it.

    A dagster.yaml that a person changed stays; one that was written here before the folder was moved is written anew.
    """
    home = dagster_home(data.absolute())
    home.mkdir(parents=True, exist_ok=True)
    file = home / "dagster.yaml"
    if not file.exists() or _is_own(file):
        write_durably(file, yaml.safe_dump(instance_config(str(home)), sort_keys=False).encode())
    return home


def _is_own(file: Path) -> bool:
    """Whether the file says just what this program writes, for whichever folder."""
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
        return bool(found == instance_config(found["storage"]["sqlite"]["base_dir"]))
    except (KeyError, TypeError, yaml.YAMLError):
        return False  # a person's own


@contextlib.contextmanager
def open_instance(home: Path) -> Iterator[dg.DagsterInstance]:
    """The instance that `<home>/dagster.yaml` describes. Raises RequestError where that can't be had."""
    import dagster as dg

    try:
        instance = dg.DagsterInstance.from_config(str(home))
    except Exception as error:  # noqa: BLE001  (a person's storage can fail in any way, and its own words say how)
        raise RequestError(f"{home / 'dagster.yaml'}: {' '.join(str(error).split())}") from None
    with instance:
        yield instance
