"""The learner on several nodes from one command: an agent a node, started through ssh or srun, and one end for all.

An agent is the same command with OAPL_NODE and OAPL_MEETING set. It holds its standard input open and ends when that
does, so no agent outlives the head, wherever it runs and however the head ended: ssh and srun pass the end on.
"""

from __future__ import annotations

import os
import queue
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline import modules
from pipeline.errors import RequestError, WorkError
from pipeline.recipe import Learning

NODE, MEETING = "OAPL_NODE", "OAPL_MEETING"
"""Number of a node; how many there are and where they meet: `2@host:port`."""
RSH = "OAPL_RSH"
"""The remote shell, with its options: called with a host and one command line."""
DEFAULT_RSH = "ssh -o BatchMode=yes -o ConnectTimeout=15 -o ServerAliveInterval=15 -o ServerAliveCountMax=4"
PORT = "OAPL_MEETING_PORT"
"""Where the first node listens, if a firewall leaves no choice."""
MEETING_S = 300
"""Seconds that the first agent waits for the last."""
GRACE_S = 20.0
"""Seconds in which agents end by themselves once one has failed; a rank that lost its peers says so meanwhile."""
HERE = ("localhost", "127.0.0.1", "::1")
TAKEN_ALONG = re.compile(r"OAPL_|NCCL_|GLOO_|UCX_|FI_|DEEPSPEED_TIMEOUT$|OMP_|HF_HOME$|PYTHONPATH$|LD_LIBRARY_PATH$")
"""Names of the environment that go to other hosts: none that holds a secret."""
LOST = re.compile(r"lost the others")
FROM_SSH = 255


@dataclass(frozen=True, slots=True)
class Place:
    """Of this agent among the others."""

    number: int
    nodes: int
    endpoint: str
    """host:port of the first node."""


def place() -> Place | None:
    """Where this process is an agent; null elsewhere."""
    if MEETING not in os.environ:
        return None
    count, _, endpoint = os.environ[MEETING].partition("@")
    # srun starts all agents with one environment, and tells each who it is.
    number = os.environ.get("SLURM_NODEID", "0") if os.environ[NODE] == "slurm" else os.environ[NODE]
    return Place(int(number), int(count), endpoint)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def follow_the_head() -> None:
    """Ends this agent, and with it its ranks, when its standard input ends."""

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun's launcher ends the ranks
        time.sleep(GRACE_S)
        os._exit(128 + signal.SIGTERM)  # ranks follow their agent

    threading.Thread(target=wait, daemon=True).start()


def start(module: str, settings: Learning) -> None:
    """Starts an agent on each node and waits for all. Raises OaplError with the line of the one that failed first."""
    agents = _under_slurm(module, settings) if settings.launcher == "slurm" else _on_hosts(module, settings)
    said: queue.Queue[tuple[int, str]] = queue.Queue()
    started: list[subprocess.Popen[str]] = []
    readers: list[threading.Thread] = []
    # A cancel comes as SIGTERM, or as SIGINT from a keyboard; in both cases the agents' input ends below.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        for number, (command, environment) in enumerate(agents.commands):
            started.append(_popen(command, environment))
            readers.append(threading.Thread(target=_read, args=(started[-1], number, said), daemon=True))
            readers[-1].start()
        failed = _wait(started)
    finally:
        _end(started)
    for reader in readers:
        reader.join(timeout=GRACE_S)
    if failed is not None:
        raise _why(agents, started, failed, list(said.queue))


@dataclass(frozen=True, slots=True)
class _Agents:
    names: Sequence[str]
    commands: Sequence[tuple[list[str], dict[str, str]]]


def _popen(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=os.environ | dict(environment),
            start_new_session=True,  # Ctrl-C is for the head, which ends the agents in order
        )
    except OSError as error:
        raise WorkError(f"can't start {command[0]}: {error.strerror}; is it installed here?") from None


def _on_hosts(module: str, settings: Learning) -> _Agents:
    """An agent on each of the recipe's hosts."""
    hosts = settings.hosts
    if len(set(hosts)) < len(hosts):
        raise RequestError(f"learning.hosts {', '.join(hosts)}: a host is named twice; give each once")
    first = hosts[0] if hosts[0] not in HERE or set(hosts) <= set(HERE) else socket.gethostname()
    meeting = f"{len(hosts)}@{'127.0.0.1' if first in HERE else first.rpartition('@')[2]}:{_port()}"
    words = modules.python(module, *sys.argv[1:])
    commands: list[tuple[list[str], dict[str, str]]] = []
    for number, host in enumerate(hosts):
        own = {NODE: str(number), MEETING: meeting}
        if host in HERE:
            commands.append((words, own))
        else:
            line = f"cd {shlex.quote(str(Path.cwd()))} && exec env {_assignments(own)} {shlex.join(words)}"
            commands.append(([*shlex.split(os.environ.get(RSH, DEFAULT_RSH)), host, line], {}))
    return _Agents(hosts, commands)


def _assignments(own: Mapping[str, str]) -> str:
    told = {name: value for name, value in os.environ.items() if TAKEN_ALONG.match(name)} | modules.told() | dict(own)
    return " ".join(shlex.quote(f"{name}={value}") for name, value in told.items())


def _under_slurm(module: str, settings: Learning) -> _Agents:
    """One srun for the allocation that this process runs in."""
    listed = os.environ.get("SLURM_JOB_NODELIST")
    if listed is None:
        raise RequestError("learning.launcher=slurm works inside an allocation (salloc, sbatch): no SLURM_JOB_NODELIST")
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", listed], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise WorkError(f"scontrol can't tell the nodes of {listed} ({error})") from None
    names = done.stdout.split()
    if not names or settings.ranks % len(names):
        raise RequestError(f"learning.ranks={settings.ranks} must be a multiple of the allocation's {len(names)} nodes")
    count = str(len(names))
    command = ["srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    own = {NODE: "slurm", MEETING: f"{count}@{names[0]}:{_port()}"} | modules.told()
    return _Agents([f"srun on {', '.join(names)}"], [([*command, *modules.python(module, *sys.argv[1:])], own)])


def _port() -> int:
    told = os.environ.get(PORT, "")
    return int(told) if told.isdigit() else free_port()


def _read(agent: subprocess.Popen[str], number: int, said: queue.Queue[tuple[int, str]]) -> None:
    """Passes on what an agent writes, but for the lines that say why it ended: the head says one of them."""
    assert agent.stderr is not None
    for line in agent.stderr:
        if line.startswith("oapl: "):
            said.put((number, line.removeprefix("oapl: ").rstrip()))
        else:
            sys.stderr.write(line)
            sys.stderr.flush()


def _wait(agents: Sequence[subprocess.Popen[str]]) -> int | None:
    """The number of the first agent that failed; null when all have ended well."""
    while True:
        codes = [agent.poll() for agent in agents]
        for number, code in enumerate(codes):
            if code:
                return number
        if all(code == 0 for code in codes):
            return None
        time.sleep(0.1)


def _end(agents: Sequence[subprocess.Popen[str]]) -> None:
    """Lets go of the agents, which end with their standard input, and waits until they have."""
    for agent in agents:
        if agent.stdin is not None and agent.poll() is None:
            agent.stdin.close()
    deadline = time.monotonic() + 2 * GRACE_S
    while any(agent.poll() is None for agent in agents):
        if time.monotonic() > deadline:
            for agent in agents:
                agent.kill()
        time.sleep(0.05)


def _why(
    agents: _Agents, started: Sequence[subprocess.Popen[str]], failed: int, said: Sequence[tuple[int, str]]
) -> WorkError:
    """The line of the node that failed first; that one lost the others is said where nobody says more."""
    own = [text for _, text in said if not LOST.search(text)] or [text for _, text in said]
    code = started[failed].returncode
    if own:
        error = WorkError(own[0])
        error.exit_code = RequestError.exit_code if code == RequestError.exit_code else WorkError.exit_code
        return error
    name = agents.names[failed]
    if code == FROM_SSH:
        return WorkError(f"can't reach {name}: try `{os.environ.get(RSH, DEFAULT_RSH)} {name} true`")
    ended = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
    return WorkError(f"the learner's launcher on {name} {ended}; see what it wrote above")
