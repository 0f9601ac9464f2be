"""What tests on a Ray cluster share: a cluster of two nodes, and an engine that says what it is asked for."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pipeline.errors import OaplError
from pipeline.generation.batch import Work
from pipeline.generation.engine import Completion, Request
from pipeline.generation.generate import generate
from pipeline.prompts.files import Prompt, PromptFile, make_prompt
from pipeline.recipe import Generation

TEST_FOLDERS = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])


@dataclass(frozen=True)
class NotedEngine:
    """Starts engines that append each request's key to a file in `notes`, one file an engine.

    A completion depends on its request's seed alone. A step takes `step_s`; of the engine that starts first, `first_s`.
    """

    notes: Path
    step_s: float = 0.0
    first_s: float | None = None
    hold_at: int | None = None
    """An engine that was asked for so many completions gives no more until there is a file `go` in `notes`."""
    fails_on: str = ""
    """prompt_id at which the process dies."""

    def __call__(self) -> _Engine:
        self.notes.mkdir(exist_ok=True)
        pause = self.step_s
        if self.first_s is not None:
            with suppress(FileExistsError):
                (self.notes / "first").touch(exist_ok=False)
                pause = self.first_s
        return _Engine(self, pause)

    def asked(self) -> dict[int, list[str]]:
        """Keys by the engine's process, in the order in which they were asked for."""
        return {int(path.name[7:]): path.read_text().split() for path in self.notes.glob("engine-*")}

    def wait_for(self, engines: int) -> dict[int, list[str]]:
        """Until so many engines hold; those that do."""
        assert self.hold_at is not None
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            holding = {pid: keys for pid, keys in self.asked().items() if len(keys) >= self.hold_at}
            if len(holding) == engines:
                return holding
            time.sleep(0.1)
        raise AssertionError(f"only {len(holding)} engines came so far")

    def wait_for_living(self, engines: int) -> None:
        """Until the processes of no more than so many engines live."""
        deadline = time.monotonic() + 120
        while (living := sum(map(_lives, self.asked()))) > engines:
            assert time.monotonic() < deadline, f"{living} engines still live"
            time.sleep(0.1)

    def go(self) -> None:
        (self.notes / "go").touch()


def _lives(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


class _Engine:
    name, version, logprobs_mode = "fake", "1", "processed_logprobs"

    def __init__(self, told: NotedEngine, pause: float) -> None:
        self._told, self._pause = told, pause
        self._running: list[tuple[int, Request]] = []
        self._asked = 0
        self._notes = (told.notes / f"engine-{os.getpid()}").open("a", buffering=1)

    def submit(self, request: Request) -> None:
        self._asked += 1
        self._notes.write(f"{request.key}\n")
        if self._told.fails_on and request.key.startswith(self._told.fails_on):
            os._exit(1)
        self._running.append((request.seed % 7 + 1, request))

    def step(self) -> list[Completion]:
        time.sleep(self._pause)
        hold = self._told.hold_at
        if hold is not None and self._asked >= hold and not (self._told.notes / "go").exists():
            return []
        done = [request for left, request in self._running if left == 1]
        self._running = [(left - 1, request) for left, request in self._running if left > 1]
        return [Completion(r.key, [4, 5, r.seed % 50 + 3], [-0.5, -0.25, -1.0], "stop") for r in done]

    def close(self) -> None:
        self._notes.close()


def prompts(count: int) -> list[Prompt]:
    return [make_prompt("math", [("user", f"What is {n} + 1?")], answer=str(n + 1)) for n in range(count)]


def settings(**changes: object) -> Generation:
    told = {"engine": "ray", "samples": 4, "max_num_seqs": 8, "shard_rows": 16, "max_tokens": 8}
    return Generation.model_validate({**told, **changes})


@contextmanager
def two_nodes() -> Iterator[Any]:
    """A cluster of a head and one more node, with room for one replica each; RAY_ADDRESS is set to it."""
    from ray.cluster_utils import Cluster

    changed = {
        "PYTHONPATH": os.pathsep.join(filter(None, [TEST_FOLDERS, os.environ.get("PYTHONPATH")])),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_worker_niceness": "0",
    }
    kept = {name: os.environ.pop(name, None) for name in ("RAY_ADDRESS", *changed)}
    os.environ.update(changed)
    head = {"num_cpus": 1, "include_dashboard": False, "wait": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        add_node(cluster)
        os.environ["RAY_ADDRESS"] = cluster.address
        yield cluster
    finally:
        cluster.shutdown()
        for name, value in kept.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def add_node(cluster: Any) -> None:
    """One more node, waited for longer than Ray does: cores may be shared."""
    cluster.add_node(num_cpus=1, wait=False)
    cluster.wait_for_nodes(timeout=120)


def main(policy: str, prompt_file: str, out: str, notes: str) -> None:
    """A generation as a process of its own, which a test can kill."""
    engine = NotedEngine(Path(notes), step_s=0.02, hold_at=60)
    generate(Work(Path(policy), settings(), 3, 11), PromptFile(Path(prompt_file)), Path(out), engine)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except OaplError as error:
        sys.stderr.write(f"oapl: {error}\n")
        sys.exit(error.exit_code)
