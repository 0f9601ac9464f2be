"""Attention over sequences of unlike length as they lie: PyTorch's varlen_attn, and flash-attn's.

Both are FlashAttention, take the same offsets, and align the causal mask to the right where a segment has more keys
than queries: its last query sees all keys, which is what a completion behind a shared prompt needs. Read in PyTorch's
`aten/.../flash_attn/flash_api.cpp` (mha_varlen_fwd, mha_varlen_bwd) and in flash-attn's `csrc/flash_attn/src/mask.h`
and `flash_bwd_kernel.h`: a query sees columns below `row + 1 + seqlen_k - seqlen_q`, forward and backward.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import RequestError
from trainer.packing import Kernel, Layout

Segments = Callable[[Tensor, Tensor, Tensor, Layout, float], Tensor]
"""(query [tokens, heads, size], key and value [keys, key heads, size], layout, scale) -> [tokens, heads, size]"""
LARGEST_HEAD = 256
HUB, HUB_VERSION = "kernels-community/flash-attn2", 3
"""flash-attn, compiled, for the package `kernels`; the version that transformers 5 takes."""


def over_segments(found: Callable[[], Segments]) -> Kernel:
    """The kernel that gives each segment its prefix's keys before its own; `found` gets what it runs on."""

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, layout: Layout) -> Tensor:
        size = query.shape[-1]
        if size > LARGEST_HEAD:
            raise RequestError(
                f"the policy's attention heads are {size} wide, and FlashAttention takes {LARGEST_HEAD} at the most; "
                "set learning.attention=sdpa"
            )
        if layout.keys is not None:
            key, value = key.index_select(0, layout.keys), value.index_select(0, layout.keys)
        if size % 8:  # PyTorch's takes multiples of 8 only; zeros change no product
            query, key, value = (F.pad(whole, (0, -size % 8)) for whole in (query, key, value))
        return found()(query, key, value, layout, scale)[..., :size]

    return attend


def runs_here() -> bool:
    """Whether PyTorch's varlen_attn runs on this machine's cards: Ampere or newer, PyTorch 2.10 or newer."""
    return (
        torch.cuda.is_available()
        and torch.version.hip is None
        and torch.cuda.get_device_capability() >= (8, 0)
        and find_spec("torch.nn.attention.varlen") is not None
    )


@functools.cache
def of_torch() -> Segments:
    from torch.nn.attention.varlen import varlen_attn

    return adapted(varlen_attn)


def adapted(varlen_attn: Callable[..., Any]) -> Segments:
    """PyTorch's varlen_attn, whose parameters grew from release to release, read off once.

    2.10 knows neither scale nor unlike numbers of heads, and says `is_causal`; newer ones say it by a window that is
    open to the left and closed to the right.
    """
    knows = inspect.signature(varlen_attn).parameters
    causal = {"window_size": (-1, 0)} if "window_size" in knows else {"is_causal": True}

    def attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
        told: dict[str, Any] = dict(causal)
        usual = query.shape[-1] ** -0.5
        if "scale" in knows:
            told["scale"] = scale
        elif scale != usual:
            query = query * (scale / usual)
        if key.shape[1] != query.shape[1]:
            if "enable_gqa" in knows:
                told["enable_gqa"] = True
            else:
                times = query.shape[1] // key.shape[1]
                key, value = (whole.repeat_interleave(times, dim=1) for whole in (key, value))
        starts = layout.query_starts, layout.key_starts
        found: Tensor = varlen_attn(query, key, value, *starts, layout.longest_query, layout.longest_key, **told)
        return found

    return attend


@functools.cache
def of_library() -> Segments:
    """flash-attn's where it is installed, else the compiled one of the Hub, through the package `kernels`.

    Raises RequestError where there is neither.
    """
    flash = _flash_attn()

    def attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
        starts = layout.query_starts, layout.key_starts
        found: Tensor = flash(
            query, key, value, *starts, layout.longest_query, layout.longest_key, softmax_scale=scale, causal=True
        )
        return found

    return attend


def _flash_attn() -> Callable[..., Any]:
    if find_spec("flash_attn") is not None:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]

        return flash_attn_varlen_func  # type: ignore[no-any-return]
    if find_spec("kernels") is None:
        raise RequestError(
            "learning.attention=flash needs the package flash-attn, or kernels (pip install kernels), which gets it "
            "compiled; or take varlen, which needs neither"
        )
    from kernels import get_kernel  # type: ignore[import-not-found]

    try:
        return get_kernel(HUB, version=HUB_VERSION).flash_attn_varlen_func  # type: ignore[no-any-return]
    except Exception as error:  # noqa: BLE001 - the Hub, its cache, a build that this PyTorch lacks: each its own error
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        raise RequestError(
            f"learning.attention=flash: {HUB} can't be had through the package kernels{offline}: "
            f"{' '.join(str(error).split())[:200]}; install flash-attn, or take varlen"
        ) from None
