"""Looking at published weights without torch: are they finite, and did they change."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_EXPONENT = {"F32": (np.uint32, 0x7F800000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80)}
"""For each float format, how to view it and the bits that are all set in infinities and NaNs only."""
_BLOCK = 1 << 22


@dataclass(frozen=True, slots=True)
class Weights:
    """What was found; a tensor that only one of two snapshots has counts as changed."""

    tensors: int
    not_finite: list[str]
    changed: int


def compare(folder: Path, parent: Path) -> Weights:
    """Looks at each tensor of a snapshot's safetensors files beside its parent's; memory stays at a block's size."""
    before = {name: values for file in sorted(parent.glob("*.safetensors")) for name, _, values in _tensors(file)}
    total, changed, not_finite = 0, 0, []
    for file in sorted(folder.glob("*.safetensors")):
        for name, kind, values in _tensors(file):
            total += 1
            changed += name not in before or not _equal(values, before[name])
            if not _finite(kind, values):
                not_finite.append(name)
    return Weights(total, not_finite, changed)


def _tensors(file: Path) -> Iterator[tuple[str, str, memoryview]]:
    """(name, dtype, bytes) of each tensor. Source: the safetensors format, an 8-byte length, a JSON head, the data."""
    with file.open("rb") as opened:
        data = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
    start = 8 + int.from_bytes(data[:8], "little")
    for name, facts in json.loads(bytes(data[8:start])).items():
        if name != "__metadata__":
            first, last = facts["data_offsets"]
            yield name, facts["dtype"], data[start + first : start + last]


def _finite(kind: str, values: memoryview) -> bool:
    if kind not in _EXPONENT:
        return True  # integers
    view, bits = _EXPONENT[kind]
    blocks = (np.frombuffer(values[at : at + _BLOCK], dtype=view) for at in range(0, len(values), _BLOCK))
    return not any(((block & bits) == bits).any() for block in blocks)


def _equal(one: memoryview, other: memoryview) -> bool:
    if len(one) != len(other):
        return False
    pairs = ((one[at : at + _BLOCK], other[at : at + _BLOCK]) for at in range(0, len(one), _BLOCK))
    return all(np.array_equal(np.frombuffer(a, np.uint8), np.frombuffer(b, np.uint8)) for a, b in pairs)
