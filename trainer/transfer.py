"""Tensors of a forward pass to a card: one pinned buffer, one copy that the host does not wait for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

Tree = TypeVar("Tree")
ALIGNED = 64
"""Bytes at whose multiples a tensor begins in the buffer; kernels load up to 16 at once."""


class Packed(Generic[Tree]):
    """The tensors of a dataclass, its dataclasses and tuples, side by side in the host's memory."""

    def __init__(self, tree: Tree, *, pin: bool) -> None:
        """`pin`: in memory that a card reads by itself; it needs CUDA."""
        self._tree = tree
        self._starts: list[int] = []
        tensors, end = list(_tensors(tree)), 0
        for tensor in tensors:
            self._starts.append(end)
            end += -(-tensor.nbytes // ALIGNED) * ALIGNED
        self._buffer = torch.empty(end, dtype=torch.uint8, pin_memory=pin)
        for start, tensor in zip(self._starts, tensors, strict=True):
            self._buffer[start : start + tensor.nbytes].copy_(tensor.contiguous().view(-1).view(torch.uint8))

    def on(self, device: torch.device) -> Tree:
        """The same on a device, as views of one copy."""
        moved, starts = self._buffer.to(device, non_blocking=True), iter(self._starts)

        def there(tensor: Tensor) -> Tensor:
            start = next(starts)
            return moved[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

        found: Tree = _mapped(self._tree, there, device)
        return found


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, tuple):
        for part in tree:
            yield from _tensors(part)
    elif dataclasses.is_dataclass(tree):
        for field in dataclasses.fields(tree):
            yield from _tensors(getattr(tree, field.name))


def _mapped(tree: Any, there: Callable[[Tensor], Tensor], device: torch.device) -> Any:
    """In the order of `_tensors`; what else knows how to move is asked to."""
    if isinstance(tree, Tensor):
        return there(tree)
    if isinstance(tree, tuple):
        return tuple(_mapped(part, there, device) for part in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [field.name for field in dataclasses.fields(tree)]
        return dataclasses.replace(tree, **{name: _mapped(getattr(tree, name), there, device) for name in names})
    return tree.to(device) if hasattr(tree, "to") else tree
