"""A pass travels as one buffer and arrives as it was."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from test_packing import some_examples

from trainer.passes import FILLER, Pass, collate
from trainer.transfer import ALIGNED, Packed

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Inner:
    parts: tuple[torch.Tensor, ...]
    longest: int = 7
    none: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Outer:
    odd: torch.Tensor
    flags: torch.Tensor
    inner: Inner
    single: torch.Tensor
    nothing: torch.Tensor
    moves: Any = field(default=None)


class Moves:
    """As a kernel's own mask might: not a dataclass, and knows the way."""

    def __init__(self) -> None:
        self.seen: torch.device | None = None

    def to(self, device: torch.device) -> Moves:
        self.seen = device
        return self


def tensors(tree: Any) -> list[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, tuple):
        return [found for part in tree for found in tensors(part)]
    names = getattr(tree, "__dataclass_fields__", ())
    return [found for name in names for found in tensors(getattr(tree, name))]


def test_all_tensors_arrive_in_one_piece() -> None:
    inner = Inner((torch.arange(5, dtype=torch.int32), torch.arange(12).reshape(3, 4).t()))
    tree = Outer(
        torch.arange(3, dtype=torch.uint8), torch.tensor([[True, False], [False, True]]), inner,
        torch.tensor(2.5, dtype=torch.bfloat16), torch.zeros(0, 4), Moves(),
    )  # fmt: skip
    found = Packed(tree, pin=False).on(CPU)
    before, after = tensors(tree), tensors(found)
    assert len(before) == len(after) == 6
    for one, other in zip(before, after, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape) and torch.equal(one, other)
    assert len({tensor.untyped_storage().data_ptr() for tensor in after}) == 1
    assert all(tensor.storage_offset() * tensor.element_size() % ALIGNED == 0 for tensor in after)
    assert (found.inner.longest, found.inner.none, found.moves.seen) == (7, None, CPU)


@pytest.mark.parametrize("attention", [None, "sdpa", "flash", "flex"])
def test_a_pass_arrives_as_it_was(attention: str | None) -> None:
    taken = collate(*some_examples(1, 20), 0, attention)
    found = Packed(taken, pin=False).on(CPU)
    assert isinstance(found, Pass)
    pairs = list(zip(tensors(taken), tensors(found), strict=True))
    assert len(pairs) >= 9 and all(torch.equal(one, other) for one, other in pairs)
    assert taken.to(CPU) is taken  # on a CPU nothing is copied


def test_what_fills_up_is_one_token() -> None:
    taken = collate([FILLER], [0], 0, "sdpa")
    assert taken.ids.numel() == taken.targets.numel() == 1
    assert taken.behaviour.isfinite().all()
