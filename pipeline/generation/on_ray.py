"""Generation on a Ray cluster: replicas are actors, and this process schedules them (see `fleet`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from pipeline.errors import OaplError
from pipeline.generation import cluster
from pipeline.generation.batch import Work
from pipeline.generation.engine import Engine
from pipeline.generation.fleet import Fleet, Lost
from pipeline.generation.replica import Replica, Report
from pipeline.progress import Progress
from pipeline.prompts.files import Prompt
from pipeline.rollouts.store import RolloutWriter
from pipeline.storage.places import local_path

STOP_S = 60.0


def generate_on_ray(
    work: Work,
    start_engine: Callable[[], Engine],
    prompts: Iterator[Prompt],
    wanted: int,
    writer: RolloutWriter,
    progress: Progress,
) -> None:
    """Generates the groups of `prompts`, of which there are `wanted`, into the writer's dataset.

    Raises RequestError where a replica finds the request wrong, WorkError where replicas are lost again and again.
    """
    with cluster.connected("generate"):
        crew = _Actors(work, start_engine, writer)
        fleet = Fleet(crew, work.settings, prompts, wanted, writer, progress)
        try:
            fleet.run()
        finally:
            fleet.stop()


class _Actors:
    """The Crew on Ray: a replica is an actor, a call the reference to its result."""

    place = "node of the Ray cluster"

    def __init__(self, work: Work, start_engine: Callable[[], Engine], writer: RolloutWriter) -> None:
        here = local_path(writer.folder)
        # Workers have another current folder.
        folder = str(writer.folder if here is None else here.absolute())
        self._told = work, start_engine, folder, writer.manifest.provenance
        self._needs: dict[str, float] = {"CPU": work.settings.replica_cpus}
        if cluster.has_gpus():
            self._needs["GPU"] = work.settings.tensor_parallel
        self.needs = " and ".join(f"{number} {name}" for name, number in self._needs.items())

    def now(self) -> float:
        return time.monotonic()

    def room(self) -> int:
        return sum(cluster.nodes(self._needs).values())

    def start(self, name: str) -> Any:
        import ray

        actor = ray.remote(Replica).options(
            num_cpus=self._needs["CPU"],
            num_gpus=self._needs.get("GPU", 0),
            max_restarts=0,
            scheduling_strategy="SPREAD",
        )
        return actor.remote(*self._told, name)

    def call(self, replica: Any, method: str, *arguments: Any) -> Any:
        return getattr(replica, method).remote(*arguments)

    def wait(self, calls: Collection[Any], timeout: float) -> Sequence[Any]:
        import ray

        waiting = list(calls)
        ended, _ = ray.wait(waiting, num_returns=1, timeout=timeout)
        if ended:
            ended, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
        return list(ended)

    def result(self, call: Any) -> Report | None:
        import ray

        try:
            report: Report | None = ray.get(call)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, OaplError):
                raise error.cause from None
            raise Lost(" ".join(str(error.cause).split())[:300]) from None
        except ray.exceptions.RayError as error:
            raise Lost(type(error).__name__ + ": " + " ".join(str(error).split())[:200]) from None
        return report

    def end(self, replicas: Sequence[Any]) -> None:
        import ray

        calls = [replica.stop.remote() for replica in replicas]
        if calls:
            ray.wait(calls, num_returns=len(calls), timeout=STOP_S)
        for replica in replicas:
            ray.kill(replica)

    def kill(self, replica: Any) -> None:
        import ray

        ray.kill(replica)
