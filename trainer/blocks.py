"""Attention by blocks of a mask: PyTorch's flex_attention, which is compiled into a kernel on a GPU."""

from __future__ import annotations

import functools
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from trainer.packing import BLOCK, Layout

_MASKS: WeakKeyDictionary[Layout, Any] = WeakKeyDictionary()
"""A pass's mask, for all of its layers, forward and backward; gone with the pass."""


def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, layout: Layout) -> Tensor:
    """See `packing.Kernel`. Not compiled on a CPU, where it serves to check the mask: it has no backward pass there."""
    from torch.nn.attention.flex_attention import flex_attention

    kernel = _compiled() if query.is_cuda else flex_attention
    q, k, v = (whole.transpose(0, 1).unsqueeze(0) for whole in (query, key, value))
    grouped = key.shape[1] != query.shape[1]
    attended: Tensor = kernel(q, k, v, block_mask=mask_of(layout), scale=scale, enable_gqa=grouped)
    return attended.squeeze(0).transpose(0, 1)


def mask_of(layout: Layout) -> Any:
    """The layout's BlockMask, made once, on the device on which the layout lies."""
    found = _MASKS.get(layout)
    if found is None:
        found = _MASKS[layout] = _made(layout)
    return found


def _made(layout: Layout) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    segment, prefix = layout.segment, layout.prefix
    assert segment is not None and prefix is not None

    def allowed(_batch: Tensor, _head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        inside = (segment[column] == segment[row]) | (segment[column] == prefix[row])
        return (column <= row) & inside

    some, which, wholly, which_wholly = (part[None, None] for part in layout.blocks)  # one for all heads
    lengths = (len(segment), len(segment))
    return BlockMask.from_kv_blocks(some, which, wholly, which_wholly, BLOCK, allowed, lengths)


@functools.cache
def _compiled() -> Any:
    """Once a process: passes have unlike lengths, which `dynamic` takes without compiling anew for each."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)
