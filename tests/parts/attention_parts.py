"""Kernels that only cards have, by what is documented of them: in float64, one segment after another."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen as torch_varlen

from trainer import varlen


def segment_by_segment(
    query: Tensor, key: Tensor, value: Tensor, starts: tuple[Tensor, Tensor], longest: tuple[int, int], scale: float
) -> Tensor:
    """FlashAttention over [tokens, heads, size], causal, aligned to the bottom right: the last query sees every key."""
    assert all(part.dtype == torch.int32 and part[0] == 0 for part in starts)
    assert [int(part[-1]) for part in starts] == [len(query), len(key)] and len(key) == len(value)
    assert [int(part.diff().max()) for part in starts] == list(longest)
    assert query.shape[-1] % 8 == 0 and query.shape[1] % key.shape[1] == 0
    group = query.shape[1] // key.shape[1]
    found = []
    for (first, last), (left, right) in zip(*(pairwise(part.tolist()) for part in starts), strict=True):
        q, k, v = (part.double().transpose(0, 1) for part in (query[first:last], key[left:right], value[left:right]))
        heads = [head // group for head in range(query.shape[1])]
        scores = q @ k[heads].transpose(1, 2) * scale
        rows, columns = torch.arange(scores.shape[1])[:, None], torch.arange(scores.shape[2])
        hidden = columns > rows + scores.shape[2] - scores.shape[1]
        found.append((scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v[heads]).transpose(0, 1))
    return torch.cat(found).to(query.dtype)


def of_2_10(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    is_causal: bool = False, return_aux: Any = None,
) -> Tensor:  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn as PyTorch 2.10 has it."""
    assert is_causal and return_aux is None and query.shape[1] == key.shape[1]
    scale = query.shape[-1] ** -0.5
    return segment_by_segment(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), scale)


def between(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    *, return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    seqused_k: Any = None,
) -> Tensor:  # fmt: skip
    """As it was after 2.10 and before it took unlike numbers of heads."""
    assert window_size == (-1, 0) and scale is not None and query.shape[1] == key.shape[1]
    return segment_by_segment(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), scale)


def of_2_13(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    *, return_aux: Any = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False, seqused_k: Any = None, block_table: Any = None, num_splits: int | None = None,
) -> Tensor:  # fmt: skip
    """As PyTorch 2.13 has it."""
    assert window_size == (-1, 0) and scale is not None and enable_gqa == (query.shape[1] != key.shape[1])
    return segment_by_segment(query, key, value, (cu_seq_q, cu_seq_k), (max_q, max_k), scale)


def flash_attn_varlen_func(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float = 0.0, softmax_scale: float | None = None, causal: bool = False,
) -> Tensor:  # fmt: skip
    """flash-attn's."""
    assert causal and softmax_scale is not None and not dropout_p
    return segment_by_segment(q, k, v, (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), softmax_scale)


def module(name: str, **members: Any) -> ModuleType:
    """An installed package of that name, as far as importing it goes."""
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    vars(made).update(members)
    return made


def put_in_place(monkeypatch: pytest.MonkeyPatch, varlen_attn: Any = of_2_13) -> None:
    """Stand-ins for PyTorch's varlen_attn and for the package flash-attn, until the test ends."""
    monkeypatch.setattr(torch_varlen, "varlen_attn", varlen_attn)
    monkeypatch.setitem(sys.modules, "flash_attn", module("flash_attn", flash_attn_varlen_func=flash_attn_varlen_func))
    monkeypatch.setattr(varlen, "of_torch", varlen.of_torch.__wrapped__)
    monkeypatch.setattr(varlen, "of_library", varlen.of_library.__wrapped__)
