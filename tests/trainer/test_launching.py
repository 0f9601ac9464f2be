"""The learner on several nodes from one command: two agents here, as localhost, through a stand-in for ssh, and through
stand-ins for srun and scontrol."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from learning_parts import Learned, Made, read_log, trainer_command, trainer_environment
from test_ranks import assert_same_round, learned

from pipeline.recipe import Recipe

Learn = Callable[..., Learned]
Recipes = Callable[..., Recipe]

HERE = {"launcher": "torchrun-hosts", "hosts": ["localhost", "127.0.0.1"]}
ELSEWHERE = {"launcher": "torchrun-hosts", "hosts": ["127.0.0.1", "node-b"]}
RSH = """#!/bin/sh
# As ssh does: the host, then one line for its shell, which starts with next to nothing in its environment.
echo "$1" >> "{log}"
shift
exec env -i HOME="$HOME" PATH="$PATH" OMP_NUM_THREADS=1 sh -c "$*"
"""
SCONTROL = """#!/bin/sh
[ "$*" = "show hostnames node-[1-2]" ] && printf '127.0.0.1\\nnode-2\\n'
"""
SRUN = """#!{python}
import os, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
tasks = [subprocess.Popen(words, env=os.environ | {{"SLURM_NODEID": str(node)}}) for node in range(2)]
sys.exit(max(task.wait() for task in tasks))
"""


def program(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    place = folder / name
    place.write_text(text)
    place.chmod(0o755)
    return place


def start(made: Recipe, dataset: Made, policy: Path, out: Path, **environment: str) -> subprocess.Popen[str]:
    command = trainer_command(made, dataset.place, policy, out)
    return subprocess.Popen(
        command, env=trainer_environment(**environment), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def agents(out: Path) -> list[psutil.Process]:
    """All processes of a round that learns into `out`."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if str(out) in words and "trainer" in words and process.pid != os.getpid():
            found.append(process)
    return found


def test_two_hosts(recipe: Recipes, dataset: Made, policy: Path, learn_here: Learn, tmp_path: Path) -> None:
    """One here, one through the remote shell; ZeRO-3 has half of the weights on each. It is one process's round."""
    rsh = program(tmp_path / "bin", "rsh", RSH.format(log=tmp_path / "asked"))
    made = recipe(ranks=2, zero_stage=3, **ELSEWHERE)
    with start(made, dataset, policy, tmp_path / "out", OAPL_RSH=str(rsh)) as head:
        said, errors = head.communicate(timeout=300)
    assert head.returncode == 0, errors
    assert said.count("log-probability gap") == 1
    assert (tmp_path / "asked").read_text() == "node-b\n"
    assert_same_round(learn_here(dataset.place, recipe()), learned(tmp_path / "out"))


def test_an_allocation(recipe: Recipes, dataset: Made, policy: Path, learn_here: Learn, tmp_path: Path) -> None:
    program(tmp_path / "bin", "scontrol", SCONTROL)
    program(tmp_path / "bin", "srun", SRUN.format(python=sys.executable))
    told = {"SLURM_JOB_NODELIST": "node-[1-2]", "SLURM_JOB_NUM_NODES": "2"}
    told["PATH"] = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    with start(recipe(ranks=2, launcher="slurm"), dataset, policy, tmp_path / "out", **told) as head:
        _, errors = head.communicate(timeout=300)
    assert head.returncode == 0, errors
    assert_same_round(learn_here(dataset.place, recipe()), learned(tmp_path / "out"))


def test_a_rank_that_is_killed_ends_all_nodes(recipe: Recipes, dataset: Made, policy: Path, tmp_path: Path) -> None:
    """And so does a cancel: in both cases nothing is left behind."""
    out = tmp_path / "out"
    for cancelled in (False, True):
        endless = recipe(ranks=2, epochs=100_000, learning_rate=1e-9, **HERE)
        with start(endless, dataset, policy, out) as head:
            log, deadline = out / "learning.jsonl", time.monotonic() + 300
            while not log.exists() or len(read_log(log)) < 2:
                assert time.monotonic() < deadline and head.poll() is None
                time.sleep(0.2)
            working = agents(out)
            assert len(working) == 5  # the head, two agents, two ranks
            if cancelled:
                head.send_signal(signal.SIGTERM)
            else:
                parents = {process.ppid() for process in working}
                next(process for process in working if process.pid not in parents).kill()
            _, errors = head.communicate(timeout=120)
        said = [line for line in errors.splitlines() if line.startswith("oapl: ")]
        if cancelled:
            assert head.returncode == 128 + signal.SIGTERM
        else:
            assert head.returncode == 1 and len(said) == 1 and "was ended by signal 9" in said[0], errors
        deadline = time.monotonic() + 30
        while agents(out) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert agents(out) == []
        log.unlink()
    assert not list(out.glob("*/snapshot.json"))


@pytest.mark.parametrize(
    ("launcher", "rsh", "code", "said"),
    [
        (ELSEWHERE, "exit 255", 1, "can't reach node-b: try `"),
        (ELSEWHERE, "echo 'oapl: no such folder' >&2; exit 2", 2, "no such folder"),
        ({"launcher": "slurm"}, "", 2, "learning.launcher=slurm works inside an allocation"),
        (HERE | {"hosts": ["node-b", "node-b"]}, "", 2, "a host is named twice"),
    ],
)
def test_a_node_that_does_not_start(
    launcher: dict[str, object], rsh: str, code: int, said: str, recipe: Recipes, dataset: Made, policy: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Said in one line, and soon: the node that does start waits for no other."""
    shell = program(tmp_path / "bin", "rsh", f"#!/bin/sh\n{rsh}\n")
    with start(recipe(ranks=2, **launcher), dataset, policy, tmp_path / "out", OAPL_RSH=str(shell)) as head:
        _, errors = head.communicate(timeout=120)
    lines = [line for line in errors.splitlines() if line.startswith("oapl: ")]
    assert head.returncode == code and len(lines) == 1 and said in lines[0], errors
    assert agents(tmp_path / "out") == []


def test_memory_that_is_short_is_told_with_a_cure(tmp_path: Path) -> None:
    """As torch says it on a card and on a host."""
    script = tmp_path / "short.py"
    for raised in ("torch.OutOfMemoryError('CUDA out of memory')", 'RuntimeError("can\'t allocate memory: 12 bytes")'):
        script.write_text(
            "import torch\nfrom pipeline.recipe import Learning\nfrom trainer import launching\n"
            f"def work():\n    raise {raised}\n"
            "launching.run('trainer', Learning(), work, lambda: 'set learning.zero_stage=3')\n"
        )
        done = subprocess.run(
            [sys.executable, str(script)], env=trainer_environment(), capture_output=True, text=True, check=False
        )
        last = done.stderr.splitlines()[-1]
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
        assert last == "oapl: rank 0 of the learner needs more memory than the host; set learning.zero_stage=3"
