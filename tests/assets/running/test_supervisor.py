"""Child processes are logged whole and ended whole, whatever ends the step that started them."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from assets.running.supervisor import ChildFailed, run_child

REPOSITORY = Path(__file__).parents[3]

# A child that has a grandchild in a session of its own, as launchers' ranks are, and one that shrugs SIGTERM off.
FAMILY = """
import signal, subprocess, sys, time
sleeper = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", sleeper, sys.argv[1]], start_new_session=True)
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)", sys.argv[1]])
print("stage: 1/2 things, 1 s left", flush=True)
time.sleep(600)
"""
SUPERVISING = """
import signal, sys
from pathlib import Path
from assets.running.supervisor import run_child
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started the tests in the background
run_child([sys.executable, "-c", sys.argv[1], sys.argv[2]], Path(sys.argv[3]), lambda text: print(text, flush=True))
"""


def alive(mark: str) -> list[int]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and mark in process.cmdline():
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


@pytest.fixture
def supervising(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process that supervises FAMILY, once all four processes of it are there."""
    mark = uuid.uuid4().hex
    words = [sys.executable, "-c", SUPERVISING, FAMILY, mark, str(tmp_path / "stage.log")]
    process = subprocess.Popen(words, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "stage: 1/2 things, 1 s left\n"
    # The supervisor, the leash, the child and its two children carry the mark.
    within = time.monotonic() + 20  # on a busy machine the last of them is there, and not yet what it becomes
    while len(alive(mark)) < 5 and time.monotonic() < within:
        time.sleep(0.05)
    assert len(alive(mark)) == 5
    yield process, mark
    process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_nothing_outlives_the_supervisor(
    supervising: tuple[subprocess.Popen[str], str], number: signal.Signals
) -> None:
    process, mark = supervising
    process.send_signal(number)
    deadline = time.monotonic() + 20
    while alive(mark) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive(mark) == []
    assert process.wait(timeout=5) != 0


def test_what_outlives_its_parent_is_ended_too(tmp_path: Path) -> None:
    mark = uuid.uuid4().hex
    leaves = (
        "import subprocess, sys; "
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)', sys.argv[1]], start_new_session=True)"
    )
    run_child([sys.executable, "-c", leaves, mark], tmp_path / "log", lambda text: None)
    assert alive(mark) == []


def test_log_is_whole_and_progress_is_told(tmp_path: Path) -> None:
    script = "import sys; print('noise'); print('learn: 3/8 steps, 2 s left', file=sys.stderr); print('more noise')"
    said: list[str] = []
    for _ in range(2):
        run_child([sys.executable, "-c", script], tmp_path / "logs" / "learn.log", said.append)
    assert said == ["learn: 3/8 steps, 2 s left"] * 2
    text = (tmp_path / "logs" / "learn.log").read_text()
    assert text.count("more noise") == 4 and text.count("$ ended with status 0") == 2  # the command line has it, too


@pytest.mark.parametrize(
    ("script", "code", "message"),
    [
        ("import sys; sys.stderr.write('oapl: the recipe is wrong\\n'); sys.exit(2)", 2, "the recipe is wrong"),
        ("import sys; print('out of luck'); sys.exit(3)", 3, "ended with status 3; its last line: out of luck"),
        ("import os; os.kill(os.getpid(), 9)", 137, "was ended by signal 9"),
    ],
)
def test_a_failure_says_why(tmp_path: Path, script: str, code: int, message: str) -> None:
    with pytest.raises(ChildFailed) as caught:
        run_child([sys.executable, "-c", script], tmp_path / "log", lambda text: None)
    assert caught.value.code == code and message in caught.value.message


def test_a_command_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ChildFailed) as caught:
        run_child([str(tmp_path / "nothing")], tmp_path / "log", lambda text: None)
    assert caught.value.code == 127 and "can't be started: No such file" in caught.value.message


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        run_child([sys.executable, "-c", "pass"], tmp_path / "log", lambda text: None)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
