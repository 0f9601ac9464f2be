"""Safetensors files read and written a tensor at a time, so that no model has to fit into memory.

Source of the format: the safetensors documentation. A file is the head's length in 8 bytes (little endian), the head
in JSON (each tensor's dtype, shape and place), then the data. Of tensors of one dtype, `safetensors.torch.save_file`
writes the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
"""Of one element, by the format's name of its dtype."""
SHARD_BYTES = 5 * 10**9
"""Most that a file holds, unless one tensor alone is larger."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file."""

    dtype: str
    """The format's name: F32, BF16, ..."""
    shape: tuple[int, ...]
    file: Path
    first: int
    """Of its bytes in the file."""
    last: int
    """The first byte that is no longer its own."""

    @property
    def data(self) -> memoryview:
        """Its bytes, read from the disk when they are looked at; the memory is free when nobody holds them any more."""
        if self.first == self.last:
            return memoryview(b"")
        begin = self.first - self.first % mmap.ALLOCATIONGRANULARITY
        with self.file.open("rb") as opened:
            # Copy-on-write: torch takes no memory that it must not write to, and nothing is ever written back.
            mapped = mmap.mmap(opened.fileno(), self.last - begin, access=mmap.ACCESS_COPY, offset=begin)
        return memoryview(mapped)[self.first - begin :]


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor that is going to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return BYTES[self.dtype] * math.prod(self.shape)


def stored(folder: Path, stem: str = "*") -> dict[str, Stored]:
    """All tensors of the folder's files, or of those that a `Writer` with this stem made; nothing is read yet."""
    files = [*folder.glob(f"{stem}.safetensors"), *folder.glob(f"{stem}-*-of-*.safetensors")]
    return {name: tensor for file in sorted(set(files)) for name, tensor in tensors_of(file)}


def tensors_of(file: Path) -> Iterator[tuple[str, Stored]]:
    """Each tensor of a file, by name."""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        head = json.loads(opened.read(size))
    for name, facts in head.items():
        if name != "__metadata__":
            first, last = facts["data_offsets"]
            yield name, Stored(facts["dtype"], tuple(facts["shape"]), file, 8 + size + first, 8 + size + last)


class Writer:
    """Writes planned tensors, in the order of their names, into `<stem>.safetensors` or numbered shards and an index.

    Each file is hashed while it is written: `hashes`, by name, is complete after `close`.
    """

    def __init__(self, folder: Path, stem: str, plan: Sequence[Planned], shard_bytes: int = SHARD_BYTES) -> None:
        self.hashes: dict[str, str] = {}
        self._folder, self._stem = folder, stem
        self._shards = _in_shards(_in_order(plan), shard_bytes)
        self._shard, self._left = -1, 0
        self._place: dict[str, str] = {}
        self._file: IO[bytes] | None = None

    def write(self, name: str, data: memoryview | bytes) -> None:
        """The next tensor's bytes, little endian, in the order of its elements."""
        if not self._left:
            self._open_next()
        planned = self._shards[self._shard][-self._left]
        assert planned.name == name and planned.bytes == len(data), f"{planned} was next, not {name}, {len(data)} bytes"
        self._put(data)
        self._left -= 1
        self._place[name] = self._name

    def close(self) -> None:
        self._end_file()
        assert not self._left and self._shard == len(self._shards) - 1, "not all that was planned has been written"
        if len(self._shards) > 1:
            total = sum(planned.bytes for shard in self._shards for planned in shard)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(self._place.items()))}
            data = (json.dumps(index, indent=2) + "\n").encode()
            name = f"{self._stem}.safetensors.index.json"
            (self._folder / name).write_bytes(data)
            self.hashes[name] = hashlib.sha256(data).hexdigest()

    def _open_next(self) -> None:
        self._end_file()
        self._shard += 1
        shard = self._shards[self._shard]
        self._left = len(shard)
        count = len(self._shards)
        self._name = f"{self._stem}.safetensors"
        if count > 1:
            self._name = f"{self._stem}-{self._shard + 1:05d}-of-{count:05d}.safetensors"
        self._file, self._hash = (self._folder / self._name).open("wb"), hashlib.sha256()
        self._put(_head(shard))

    def _put(self, data: memoryview | bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._hash.update(data)

    def _end_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self.hashes[self._name] = self._hash.hexdigest()
            self._file = None


def _in_order(plan: Sequence[Planned]) -> list[Planned]:
    return sorted(plan, key=lambda planned: planned.name)


def _in_shards(plan: Sequence[Planned], most: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    filled = 0
    for planned in plan:
        if shards[-1] and filled + planned.bytes > most:
            shards.append([])
            filled = 0
        shards[-1].append(planned)
        filled += planned.bytes
    return shards


def _head(shard: Sequence[Planned]) -> bytes:
    facts: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for planned in shard:
        facts[planned.name] = {
            "dtype": planned.dtype,
            "shape": list(planned.shape),
            "data_offsets": [at, at + planned.bytes],
        }
        at += planned.bytes
    text = json.dumps(facts, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    return len(text).to_bytes(8, "little") + text
