"""A driver and writers as processes that can be killed, for the tests of many writers; forked from one that has all
modules loaded, since a test starts dozens."""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess

from rollout_data import group, prompt_name, provenance

from pipeline.errors import OaplError
from pipeline.rollouts.shards import ShardWriter
from pipeline.rollouts.store import RolloutWriter


def forking() -> ForkServerContext:
    # The server of Python 3.11 looks for what it loads in its environment's path, not in ours.
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["writing_processes"])
    return context


def drive(folder: str, count: int) -> None:
    """The driver of a dataset of the groups 0 to `count`: lists what writers have recorded until all is there."""
    with RolloutWriter(folder, provenance(), samples=4, shared=True) as writer:
        while not all(prompt_name(number) in writer.committed for number in range(count)):
            writer.adopt(now=random.random() < 0.05)  # on a busy machine an adoption's share may be a long wait
            time.sleep(0.005)


def replica(folder: str, name: str, numbers: Sequence[int], rest: float) -> None:
    """A writer that makes these groups, two a shard; it ends when a newer driver refuses it."""
    try:
        with ShardWriter(folder, provenance(), samples=4, writer=name, shard_rows=8) as writer:
            for number in numbers:
                writer.add_group(group(number))
                time.sleep(random.expovariate(1 / rest))
    except OaplError:
        return


def store_processes(environment: dict[str, str], name: str, *arguments: object) -> None:
    """The same on an object store, which the environment says how to reach."""
    os.environ |= environment
    {"drive": drive, "replica": replica}[name](*arguments)  # type: ignore[operator]


def start(context: ForkServerContext, target: object, *arguments: object) -> ForkServerProcess:
    process = context.Process(target=target, args=arguments)  # type: ignore[arg-type]
    process.start()
    return process
