"""The partitions: a round is a partition, `0000`, `0001`, ..., and round k+1 can be opened once k exists.

The embedded run's assets carry plain keys. Those of every other run lie below the run's name, and its rounds are
partitions of their own, so that several runs share one instance and one UI without touching each other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import dagster as dg

from assets.running.settings import DEFAULT_RUN, chosen, partitions_name
from pipeline.errors import RequestError
from pipeline.layout import round_key

CHOSEN = chosen()
RECIPE = CHOSEN.settings()
"""Settings that the launchpad shows as defaults."""
RUN_NAME = RECIPE.name
PREFIX: list[str] = [] if RUN_NAME == DEFAULT_RUN else [RUN_NAME]
GROUP = re.sub(r"\W", "_", RUN_NAME)
"""A run is a group of assets, and so a box of its own in the lineage."""

TAGS = {"oapl/run": RUN_NAME}
"""What Dagster's runs of this run carry."""
PARTITION = "dagster/partition"
UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]

rounds = dg.DynamicPartitionsDefinition(name=partitions_name(RUN_NAME))


def asset_key(name: str) -> dg.AssetKey:
    return dg.AssetKey([*PREFIX, name])


def round_of(partition: str) -> int:
    """The round that a partition stands for. Raises RequestError for others; a person can make some of any name."""
    if not partition.isdecimal() or partition != round_key(int(partition)):
        raise RequestError(f"partition {partition!r} is no round; rounds are named {round_key(0)}, {round_key(1)}, ...")
    return int(partition)


def unfinished(instance: dg.DagsterInstance, limit: int, round: int | None = None) -> Sequence[dg.DagsterRun]:
    """Up to `limit` of Dagster's runs that work, or wait to, on a round of this run, or on that `round`."""
    tags = TAGS if round is None else TAGS | {PARTITION: round_key(round)}
    return instance.get_runs(dg.RunsFilter(tags=tags, statuses=UNFINISHED), limit=limit)


def open_rounds(instance: dg.DagsterInstance, up_to: int) -> None:
    """Makes rounds 0 .. `up_to` partitions where they are none yet."""
    there = set(instance.get_dynamic_partitions(str(rounds.name)))
    missing = [round_key(round) for round in range(up_to + 1) if round_key(round) not in there]
    if missing:
        instance.add_dynamic_partitions(str(rounds.name), missing)
