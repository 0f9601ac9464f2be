"""Child processes of a step: started in a session of their own, watched, logged whole, and ended whole."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from assets.running import leash
from pipeline import modules

PROGRESS = re.compile(r"^[a-z][a-z _]*: [\d,.]+/[\d,.]+ ")
"""How a stage says how far it is: `generate: 384/1024 completions, 9,812 tokens/s, 6 s left`."""
LAST_LINES = 20


@dataclass(frozen=True, slots=True)
class ChildFailed(Exception):
    """The child ended with another status than 0."""

    code: int
    message: str
    """Its one-line `oapl: ...` message without the prefix, else what can be said of its end."""
    tail: tuple[str, ...]
    """Its last lines."""


def run_child(
    command: Sequence[str],
    log: Path,
    say: Callable[[str], None],
    *,
    environment: Mapping[str, str] | None = None,
    copy_to: IO[str] | None = None,
) -> None:
    """Runs `command` to its end and raises ChildFailed where it fails.

    All it writes goes to `log` (appended: earlier attempts stay) and to `copy_to`; lines that tell progress go to
    `say`. However this function is left, by an interrupt too, no process of the command is left behind; the same
    holds where this process is killed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    tail: deque[str] = deque(maxlen=LAST_LINES)
    with log.open("a", encoding="utf-8", buffering=1) as file, leashed(command, environment) as child:
        file.write(f"$ {' '.join(command)}\n")
        assert child.stdout is not None
        for line in child.stdout:
            file.write(line)
            if copy_to is not None:
                copy_to.write(line)
            text = line.rstrip().rpartition("\r")[2]
            if text:
                tail.append(text)
            if PROGRESS.match(text):
                say(text)
        code = child.wait()
        file.write(f"$ ended with status {code}\n")
    if code:
        raise ChildFailed(code, _message(code, tail), tuple(tail))


def _message(code: int, tail: Sequence[str]) -> str:
    for line in reversed(tail):
        if line.startswith("oapl: "):
            return line.removeprefix("oapl: ")
    ended = f"was ended by signal {code - 128}" if code > 128 else f"ended with status {code}"
    return f"the process {ended}; its last line: {tail[-1] if tail else '(none)'}"


@contextlib.contextmanager
def leashed(
    command: Sequence[str], environment: Mapping[str, str] | None, output: int | IO[bytes] = subprocess.PIPE
) -> Iterator[subprocess.Popen[str]]:
    """The command in a session of its own, with all it writes on `output`; nothing of it is left afterwards."""
    held, kept = os.pipe()
    try:
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", leash.__file__, str(held), "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(held,),
            env=dict(os.environ) | modules.told() | {"PYTHONUNBUFFERED": "1"} | dict(environment or {}),
            text=True,
            errors="replace",
        )
    except BaseException:  # the pipe must not outlive a start that failed; the error goes on
        os.close(kept)
        raise
    finally:
        os.close(held)
    try:
        yield child
    finally:
        os.close(kept)
        _wait(child)


def _wait(child: subprocess.Popen[str]) -> None:
    """Waits until the leash has ended everything; twice its grace is more than it ever needs."""
    deadline = time.monotonic() + 2 * leash.GRACE_S
    while child.poll() is None:
        if time.monotonic() > deadline:
            child.kill()
        time.sleep(0.02)
    if child.stdout is not None:
        child.stdout.close()
