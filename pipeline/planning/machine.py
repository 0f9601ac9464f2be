"""What this machine has: cards in sight and the host's memory, found without importing torch.

OAPL_CARDS (`8x80`: eight of 80 GiB; `0`: none) and OAPL_HOST_MEMORY (GiB) stand for what is found, where a recipe is
looked at on another machine than the one that will run it.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from pipeline.errors import RequestError
from pipeline.policies.shapes import GIB

CARDS, HOST_MEMORY = "OAPL_CARDS", "OAPL_HOST_MEMORY"
VISIBLE = "CUDA_VISIBLE_DEVICES"
BUSY = 0.1
"""Share of a card's memory from which on others are taken to work on it."""


@dataclass(frozen=True, slots=True)
class Card:
    name: str
    memory: float | None
    """GiB; null: a slice whose size is not told."""
    used: float = 0.0
    """GiB that were taken when it was looked at."""


@dataclass(frozen=True, slots=True)
class Machine:
    name: str
    cards: tuple[Card, ...]
    """Those that a process started here may use."""
    memory: float
    """GiB of the host, or of this process's control group."""
    free: float
    """GiB of them that are not in use."""

    @property
    def card_memory(self) -> float | None:
        """GiB of the smallest card; null where none tells."""
        known = [card.memory for card in self.cards if card.memory is not None]
        return min(known) if known else None

    @property
    def busy(self) -> bool:
        """Whether others work on the cards."""
        return any(card.used > BUSY * (card.memory or float("inf")) for card in self.cards)

    def identity(self) -> dict[str, object]:
        """What makes it another machine: not what happens to be free."""
        return {
            "cards": [[card.name, card.memory] for card in self.cards],
            "memory": round(self.memory),
            "name": self.name,
        }


def this_machine() -> Machine:
    """What is here now. Raises RequestError where OAPL_CARDS or OAPL_HOST_MEMORY can't be read."""
    told = os.environ.get(HOST_MEMORY)
    memory, free = _host() if told is None else (_number(HOST_MEMORY, told),) * 2
    return Machine(socket.gethostname(), _cards(), memory, free)


def _number(name: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise RequestError(f"{name}={value!r}: expected a number of GiB") from None


def _cards() -> tuple[Card, ...]:
    told = os.environ.get(CARDS)
    if told is not None:
        found = re.fullmatch(r"0|(\d+)\s*x\s*([\d.]+)", told.strip())
        if found is None:
            raise RequestError(f"{CARDS}={told!r}: expected a number of cards and GiB of each, such as 8x80, or 0")
        return () if found[1] is None else (Card("card", _number(CARDS, found[2])),) * int(found[1])
    try:
        if "+cpu" in metadata.version("torch"):
            return ()  # whatever is plugged in, nothing here would use it
    except metadata.PackageNotFoundError:
        pass
    return visible(_listed(), os.environ.get(VISIBLE))


def _listed() -> list[tuple[str, str, Card]]:
    """(index, uuid, card) of each that the driver knows."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = "--query-gpu=index,uuid,memory.total,memory.used,name"
    try:
        done = subprocess.run(
            [program, query, "--format=csv,noheader,nounits"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []  # a driver that does not answer: what the card says is then found out by trying
    found = []
    for line in done.stdout.splitlines():
        index, uuid, total, used, name = (word.strip() for word in line.split(",", 4))
        whole = total.isdigit() and used.isdigit()
        card = Card(name, int(total) / 1024, int(used) / 1024) if whole else Card(name, None)
        found.append((index, uuid, card))
    return found


def visible(listed: list[tuple[str, str, Card]], chosen: str | None) -> tuple[Card, ...]:
    """Of the driver's cards, (index, uuid, card) each, those that CUDA_VISIBLE_DEVICES lets through, in its order."""
    if chosen is None:
        return tuple(card for _, _, card in listed)
    seen = []
    for word in filter(None, map(str.strip, chosen.split(","))):
        if word.startswith("MIG-"):
            seen.append(Card(word, None))
            continue
        match = [card for index, uuid, card in listed if word == index or uuid.startswith(word)]
        if not match:
            break  # CUDA, too, sees nothing behind a name that it does not know
        seen.append(match[0])
    return tuple(seen)


def _host() -> tuple[float, float]:
    """GiB in all and free: the machine's, or those of the tightest control group around this process."""
    system = psutil.virtual_memory()
    total, free = float(system.total), float(system.available)
    for limit, used in _groups():
        total, free = min(total, limit), min(free, max(0.0, limit - used))
    return total / GIB, free / GIB


def _groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[tuple[float, float]]:
    """(limit, bytes in use that can't be given back) of each control group of this process that has a limit."""
    found = []
    for line in own.read_text().splitlines() if own.exists() else []:
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory") and "memory" not in kinds.split(","):
            continue
        top = root if kinds == "" else root / "memory"
        names = ("memory.max", "memory.current") if kinds == "" else ("memory.limit_in_bytes", "memory.usage_in_bytes")
        place = top / path.strip("/")
        for folder in (place, *place.parents):
            limit, used = (_read(folder / name) for name in names)
            if limit is not None and used is not None:
                found.append((limit, used - _cache(folder / "memory.stat")))
            if folder == top:
                break
    return found


def _read(file: Path) -> float | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return float(text) if text.isdigit() else None


def _cache(stat: Path) -> float:
    """Bytes of files kept in memory, which the kernel gives up when asked."""
    try:
        lines = dict(line.split(None, 1) for line in stat.read_text().splitlines())
    except (OSError, ValueError):
        return 0.0
    return float(lines.get("inactive_file", lines.get("total_inactive_file", 0)))


def free_disk(place: Path) -> float:
    """GiB that are free where `place` is, or will be."""
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free / GIB
