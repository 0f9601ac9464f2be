"""Looking at published weights without torch: are they finite, and did they change."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.policies.tensors import stored

_EXPONENT = {"F32": (np.uint32, 0x7F800000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80)}
"""For each float format, how to view it and the bits that are all set in infinities and NaNs only."""
_BLOCK = 1 << 22
MOST_ROUNDED = 0.1
"""Share of a round's update that a snapshot's dtype may round away before a person should know."""


@dataclass(frozen=True, slots=True)
class Weights:
    """What was found; a tensor that only one of two snapshots has counts as changed."""

    tensors: int
    not_finite: list[str]
    changed: int


def compare(folder: Path, parent: Path) -> Weights:
    """Looks at each tensor of a snapshot's safetensors files beside its parent's; memory stays at a block's size."""
    before = stored(parent)
    total, changed, not_finite = 0, 0, []
    for name, tensor in stored(folder).items():
        total += 1
        data = tensor.data
        changed += name not in before or not _equal(data, before[name].data)
        if not _finite(tensor.dtype, data):
            not_finite.append(name)
    return Weights(total, not_finite, changed)


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
