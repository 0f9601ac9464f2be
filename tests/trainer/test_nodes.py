"""The learner on two nodes, each a launcher of its own with one rank: the same round, and one end for both."""

from __future__ import annotations

import base64
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from learning_parts import Learned, Made, read_log, trainer_command, trainer_environment
from test_ranks import assert_same_round, learned

from pipeline.recipe import Recipe

Learn = Callable[..., Learned]
Recipes = Callable[..., Recipe]
Nodes = Callable[[str, Recipe, Path], list["subprocess.Popen[str]"]]

pytestmark = pytest.mark.system


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def torchrun(node: int, port: int) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "round"),
        *("--local-addr", "127.0.0.1", "--module"),
    ]


def deepspeed(node: int, port: int) -> list[str]:
    """What `deepspeed --hostfile` starts on each node, through ssh."""
    world = base64.urlsafe_b64encode(json.dumps({"one": [0], "two": [0]}).encode()).decode()
    return [
        *(sys.executable, "-m", "deepspeed.launcher.launch", f"--world_info={world}", f"--node_rank={node}"),
        *("--master_addr=127.0.0.1", f"--master_port={port}", "--module"),
    ]


@pytest.fixture
def nodes(dataset: Made, policy: Path) -> Iterator[Nodes]:
    started: list[subprocess.Popen[str]] = []

    def start(launcher: str, recipe: Recipe, out: Path) -> list[subprocess.Popen[str]]:
        port = free_port()
        words = trainer_command(recipe, dataset.place, policy, out)[2:]
        for node in range(2):
            command = {"torchrun": torchrun, "deepspeed": deepspeed}[launcher](node, port) + words
            started.append(
                subprocess.Popen(
                    command,
                    env=trainer_environment(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        return started

    yield start
    for process in started:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        process.communicate()


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_two_nodes(
    launcher: str, nodes: Nodes, learn_here: Learn, recipe: Recipes, dataset: Made, tmp_path: Path
) -> None:
    """Under ZeRO-3 each node holds half of the weights; what is published is one process's round."""
    started = nodes(launcher, recipe(ranks=2, zero_stage=3), tmp_path / "out")
    errors = [process.communicate(timeout=900)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], errors
    assert_same_round(learn_here(dataset.place, recipe()), learned(tmp_path / "out"))


def test_a_node_that_dies_ends_the_other(nodes: Nodes, recipe: Recipes, tmp_path: Path) -> None:
    """Its launcher is killed and can end nothing itself: the other rank says so in one line, within half a minute."""
    endless = recipe(ranks=2, zero_stage=3, epochs=100_000)
    left, killed = nodes("torchrun", endless, tmp_path / "out")
    log = tmp_path / "out" / "learning.jsonl"
    deadline = time.monotonic() + 900
    while not log.exists() or len(read_log(log)) < 2:
        assert time.monotonic() < deadline and left.poll() is None
        time.sleep(0.2)
    killed.send_signal(signal.SIGKILL)
    _, errors = left.communicate(timeout=30)
    assert left.returncode != 0
    said = [line for line in errors.splitlines() if line.startswith("oapl: ")]
    assert len(said) == 1 and " of 2 lost the others; look at the one that ended first" in said[0]
    assert not list((tmp_path / "out").glob("*/snapshot.json"))


def test_a_rank_that_is_killed_is_told_of_in_one_line(
    recipe: Recipes, dataset: Made, policy: Path, tmp_path: Path
) -> None:
    """As the kernel does where memory is short, on one machine."""
    endless = recipe(ranks=2, epochs=100_000)
    command = trainer_command(endless, dataset.place, policy, tmp_path / "out")
    with subprocess.Popen(
        command, env=trainer_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as launcher:
        log = tmp_path / "out" / "learning.jsonl"
        deadline = time.monotonic() + 900
        while not log.exists() or len(read_log(log)) < 2:
            assert time.monotonic() < deadline and launcher.poll() is None
            time.sleep(0.2)
        ranks = [child for child in psutil.Process(launcher.pid).children() if "trainer" in child.cmdline()]
        assert len(ranks) == 2
        ranks[1].kill()
        _, errors = launcher.communicate(timeout=60)
    assert launcher.returncode == 1
    assert "Traceback" not in errors.splitlines()[-1] and errors.splitlines()[-1].startswith("oapl: rank ")
    assert "was ended by signal 9" in errors.splitlines()[-1]
