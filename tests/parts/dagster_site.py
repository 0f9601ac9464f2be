"""`oapl ui` as a person starts it, web server and daemon, and its GraphQL interface."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asset_world import World, child_environment
from persons_folder import persons_folder

LAUNCH = """mutation L($p: ExecutionParams!) { launchRun(executionParams: $p) {
    __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message }
} }"""


def wait_for(what: Callable[[], Any], seconds: float, why: str) -> Any:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(0.5)
    raise AssertionError(f"waited {seconds:.0f} s in vain for {why}")


@dataclass(frozen=True)
class Site:
    """`oapl ui` over the world's data folder."""

    address: str
    world: World

    def ask(self, query: str, **variables: Any) -> Any:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(f"{self.address}/graphql", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["data"]

    def is_up(self) -> bool:
        try:
            found = self.ask("{ repositoriesOrError { ... on RepositoryConnection { nodes { location { name } } } } }")
        except (urllib.error.URLError, ConnectionError):
            return False
        return bool(found["repositoriesOrError"].get("nodes"))

    def status(self, run_id: str) -> str:
        query = "query R($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"
        return str(self.ask(query, id=run_id)["runOrError"]["status"])

    def launch(self, job: str, partition: str) -> str:
        """Queues a job on a round, as the launchpad does; returns the id of Dagster's run."""
        selector = {"jobName": job, "repositoryName": "__repository__", "repositoryLocationName": "tiny"}
        tags = [{"key": "dagster/partition", "value": partition}]
        asked = {"selector": selector, "runConfigData": {}, "executionMetadata": {"tags": tags}}
        found = self.ask(LAUNCH, p=asked)["launchRun"]
        assert found["__typename"] == "LaunchRunSuccess", found
        return str(found["run"]["runId"])


@contextmanager
def served(world: World, *folders: Path) -> Iterator[Site]:
    """`oapl ui` over the world's data folder, begun in a person's own, with `folders` on the path of what it starts."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = [sys.executable, "-P", "-m", "pipeline.cli", "ui", "--root", str(world.root)]
    with (world.root / "ui.log").open("w") as log:
        process = subprocess.Popen(
            [*words, "--recipe", str(world.recipe), "--port", str(port)],
            cwd=persons_folder(),
            env=child_environment(*folders),
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        found = Site(f"http://127.0.0.1:{port}", world)
        try:
            wait_for(found.is_up, 300, f"the UI; see {world.root / 'ui.log'}")
            yield found
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 0
