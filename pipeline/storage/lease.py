"""Which machine works on a run at a URL: one at a time, told by an object that it renews while it works.

Clocks of machines are not compared: who finds another's name looks on for a while whether it is still renewed. The
object is put on the condition that it is what was read; a machine that was taken for dead finds out when it renews.
Nothing is deleted: who is done writes that nobody is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pipeline.errors import RequestError, WorkError
from pipeline.storage import durable
from pipeline.storage.cache import told
from pipeline.storage.objects import Objects
from pipeline.storage.places import Overtaken

LEASE = ".lease.json"
EVERY = "OAPL_LEASE_S"
EVERY_S = 20.0
"""Seconds between renewals, unless the environment's OAPL_LEASE_S says otherwise."""
SILENCES = 3.0
"""So many times as long may it be unchanged before its machine is taken for dead."""


class Holder(BaseModel):
    """What the object says."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    machine: str | None
    """A working copy's own name; null where nobody is at work."""
    host: str
    """For people."""
    nonce: str
    """Another one at each renewal."""


class Lease:
    """Held by this machine; made by `holding`."""

    def __init__(self, url: str, machine: str) -> None:
        self._store, self._machine = Objects(url), machine
        self._tag: str | None = None
        self._lost: str | None = None

    def check(self) -> None:
        """Raises WorkError where another machine has taken the run over: what is here must not be sent."""
        if self._lost is not None:
            raise WorkError(
                f"{self._store.url}: {self._lost} has taken this run over, and this machine stops; "
                "run again when that one is done"
            )

    def take(self, say: Callable[[str], None]) -> None:
        """Raises RequestError where another machine is at work on the run."""
        while True:
            found = self._read()
            if self._is_others(found):
                assert found is not None
                say(f"{found.host} was at work on this run; looking whether it still is")
                self._refuse_living(found)
            with contextlib.suppress(Overtaken):  # somebody was quicker; look again
                self._put(self._machine)
                return

    def _read(self) -> Holder | None:
        try:
            data, self._tag = self._store.read_tagged(LEASE)
        except FileNotFoundError:
            self._tag = None
            return None
        return Holder.model_validate_json(data)

    def _is_others(self, found: Holder | None) -> bool:
        return found is not None and found.machine not in (None, self._machine)

    def _refuse_living(self, found: Holder) -> None:
        deadline = time.monotonic() + SILENCES * every_s()
        while time.monotonic() < deadline:
            time.sleep(min(1.0, every_s() / 4))
            now = self._read()
            if not self._is_others(now):
                return
            if now != found:
                raise RequestError(f"{self._store.url}: {found.host} is at work on this run; wait for it")

    def _put(self, machine: str | None) -> None:
        holder = Holder(machine=machine, host=f"{socket.gethostname()}, {self._machine[:8]}", nonce=uuid.uuid4().hex)
        self._tag = self._store.replace(LEASE, holder.model_dump_json().encode(), self._tag)

    def renew(self) -> None:
        """Says that this machine is still at work, and finds out whether another one thinks it is not."""
        try:
            self._put(self._machine)
        except Overtaken:
            found = self._read()
            if self._is_others(found):
                assert found is not None
                self._lost = found.host
        except OSError:
            return  # the store does not answer: it may the next time

    def release(self) -> None:
        """Says that nobody is at work; where that fails, others wait a little."""
        with contextlib.suppress(OSError):
            if not self._is_others(self._read()):
                self._put(None)


def every_s() -> float:
    return float(os.environ.get(EVERY) or EVERY_S)


@contextlib.contextmanager
def holding(url: str, folder: Path, say: Callable[[str], None]) -> Iterator[Lease]:
    """Keeps other machines from working on the run at `url`, whose working copy is `folder`.

    Any number of processes of this machine may hold it at once; the last one gives it back. Raises RequestError where
    another machine is at work, WorkError where the store refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lease = Lease(url, _machine_of(folder))
    with (folder / ".lease.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        with told(url):
            lease.take(say)
        ended = threading.Event()

        def renew() -> None:
            while not ended.wait(every_s()):
                lease.renew()

        thread = threading.Thread(target=renew, name="lease", daemon=True)
        thread.start()
        try:
            yield lease
        finally:
            ended.set()
            thread.join()
            with contextlib.suppress(BlockingIOError):  # another process of this machine goes on
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                lease.release()


def _machine_of(folder: Path) -> str:
    """The working copy's own name, made up when it is first asked for."""
    path = folder / ".machine"
    with durable.locked(folder / ".machine.lock"):
        if not path.exists():
            durable.write_durably(path, uuid.uuid4().hex.encode())
    return path.read_text(encoding="utf-8")
