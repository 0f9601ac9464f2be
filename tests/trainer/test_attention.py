"""Each kernel against attention in float64 under a mask made pair by pair, with gradients; and what is refused."""

from __future__ import annotations

import inspect
import random
import sys
from pathlib import Path
from typing import Any

import attention_parts as parts
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.attention.varlen import varlen_attn

from pipeline.errors import RequestError
from pipeline.recipe import Learning
from trainer import attention, blocks, varlen
from trainer.packing import BLOCK, Segment, lay_out


def some_segments(seed: int, longest: int = 40) -> list[Segment]:
    """Prompts with none to four completions; one that stands alone, one of a single token."""
    rng = random.Random(seed)
    segments: list[Segment] = []
    for completions in (3, 0, 1, 4, 1):
        prompt = len(segments)
        segments.append((rng.randrange(1, longest), -1))
        segments += [(1 if member == 2 else rng.randrange(1, longest), prompt) for member in range(completions)]
    return segments


def seen(segments: list[Segment]) -> Tensor:
    """[tokens, tokens]: who sees whom. Its own segment up to itself, and all of its prompt."""
    ends = [sum(length for length, _ in segments[: number + 1]) for number in range(len(segments))]
    mask = torch.zeros(ends[-1], ends[-1], dtype=torch.bool)
    for end, (length, prefix) in zip(ends, segments, strict=True):
        mask[end - length : end, end - length : end] = torch.ones(length, length).tril().bool()
        if prefix >= 0:
            mask[end - length : end, ends[prefix] - segments[prefix][0] : ends[prefix]] = True
    return mask


def test_who_sees_whom_on_paper() -> None:
    """A prompt of two, completions of one and two, another prompt of one."""
    rows = [row.nonzero().flatten().tolist() for row in seen([(2, -1), (1, 0), (2, 0), (1, -1)])]
    assert rows == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4], [5]]


def exact(query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor) -> Tensor:
    """Attention [tokens, heads, size] in float64 under that mask."""
    group = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        scores = query[:, head].double() @ key[:, head // group].double().t() * scale
        heads.append(scores.masked_fill(~mask, float("-inf")).softmax(-1) @ value[:, head // group].double())
    return torch.stack(heads, 1)


def inputs(tokens: int, heads: int = 4, key_heads: int = 2, size: int = 8) -> list[Tensor]:
    torch.manual_seed(tokens)
    return [torch.randn(tokens, count, size, requires_grad=True) for count in (heads, key_heads, key_heads)]


def gradients(found: Tensor, weights: Tensor, of: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad((found * weights).sum(), of))


CARD = {"varlen, 2.10": parts.of_2_10, "varlen, between": parts.between, "varlen, 2.13": parts.of_2_13}


@pytest.mark.parametrize("size", [8, 12])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["sdpa", "eager", *CARD, "flash", "flex"])
def test_it_is_attention(name: str, seed: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared prompts, fewer key heads, a scale of the policy's own, and a head size that is no multiple of eight."""
    parts.put_in_place(monkeypatch, CARD.get(name, parts.of_2_13))
    kernel = name.partition(",")[0]
    segments = some_segments(seed)
    mask = seen(segments)
    given = inputs(len(mask), size=size)
    layout = lay_out(segments, kernel)
    if kernel == "flex":  # no gradients on a CPU
        given = [part.detach() for part in given]
    found, wanted = attention.KERNELS[kernel](*given, 0.3, layout), exact(*given, 0.3, mask)
    if kernel != "flex":
        weights = torch.randn(found.shape)
        for mine, right in zip(gradients(found, weights, given), gradients(wanted, weights, given), strict=True):
            torch.testing.assert_close(mine, right, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=2e-6)


def test_a_prompt_with_one_completion_is_one_segment() -> None:
    """Its keys are then the stream as it is, which nothing has to be gathered for."""
    alone = lay_out([(500, -1), (16_000, 0), (7, -1)], "varlen")
    assert alone.keys is None and alone.query_starts is not None and alone.key_starts is not None
    assert alone.query_starts.tolist() == alone.key_starts.tolist() == [0, 16_500, 16_507]
    assert (alone.longest_query, alone.longest_key) == (16_500, 16_500)
    mixed = lay_out([(2, -1), (3, 0), (2, -1), (1, 2), (1, 2)], "varlen")
    assert mixed.keys is not None and mixed.keys.tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 6, 7, 5, 6, 8]


def test_pytorch_takes_what_it_is_given() -> None:
    """The installed varlen_attn has the parameters that stand-in and adapter think of."""
    installed, thought = (inspect.signature(function) for function in (varlen_attn, parts.of_2_13))
    assert list(installed.parameters) == list(thought.parameters)
    assert [one.kind for one in installed.parameters.values()] == [one.kind for one in thought.parameters.values()]


@pytest.mark.parametrize("seed", range(6))
def test_blocks_are_those_of_the_dense_mask(seed: int) -> None:
    """Seen in part, seen whole, or not at all: exactly as pair by pair, and as PyTorch finds it from the dense mask."""
    segments = some_segments(seed, longest=(30, 100, 300, 500, 129, 257)[seed])
    mask = seen(segments)
    layout = lay_out(segments, "flex")
    count = -(-len(mask) // BLOCK)
    padded = torch.zeros(count * BLOCK, count * BLOCK, dtype=torch.bool)
    padded[: len(mask), : len(mask)] = mask
    pairs = padded.view(count, BLOCK, count, BLOCK).sum((1, 3))
    some, which, wholly, which_wholly = layout.blocks
    for row in range(count):
        assert (
            which[row, : some[row]].tolist()
            == ((pairs[row] > 0) & (pairs[row] < BLOCK**2)).nonzero().flatten().tolist()
        )
        assert which_wholly[row, : wholly[row]].tolist() == (pairs[row] == BLOCK**2).nonzero().flatten().tolist()
    made = blocks.mask_of(layout)
    theirs = create_block_mask(made.mask_mod, None, None, len(mask), len(mask), device="cpu")
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(made, name), getattr(theirs, name)), name
    assert torch.equal(made.to_dense(), theirs.to_dense()) and made.seq_lengths == theirs.seq_lengths


def test_a_mask_is_made_once_a_pass_and_the_kernel_compiled_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers share the mask; passes of other lengths share the kernel, once it was found that lengths vary."""
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    compiled = torch.compile(flex_attention, backend=counter, dynamic=True)
    monkeypatch.setattr("torch.nn.attention.flex_attention.flex_attention", compiled)
    made = []
    monkeypatch.setattr(blocks, "_made", lambda layout, make=blocks._made: made.append(0) or make(layout))
    for seed in range(4):
        segments = some_segments(seed, longest=60)
        layout = lay_out(segments, "flex")
        given = [part.detach() for part in inputs(sum(length for length, _ in segments))]
        for _ in range(2):
            found = blocks.attend(*given, 0.3, layout)
        torch.testing.assert_close(found.double(), exact(*given, 0.3, seen(segments)), rtol=0, atol=2e-6)
        del layout
    assert len(made) == 4 and counter.frame_count <= 2
    assert len(blocks._MASKS) == 0  # nothing is kept of passes that are over


def test_names_are_none_that_transformers_acts_on() -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.utils.generic import is_flash_attention_requested

    assert set(attention.NAMES) == set(attention.KERNELS)
    for kernel in attention.KERNELS:
        name = attention.register(kernel)
        assert not is_flash_attention_requested(requested_attention_implementation=name)
        assert name not in ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()
        assert not any(word in name for word in ("flash", "flex", "sdpa", "|", "/"))


def card(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], hip: str | None = None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(torch.version, "hip", hip)


@pytest.mark.parametrize(
    ("settings", "capability", "hip", "kernel"),
    [
        ({"dtype": "bfloat16"}, (9, 0), None, "varlen"),
        ({"dtype": "bfloat16"}, (8, 0), None, "varlen"),
        ({"dtype": "bfloat16"}, (7, 5), None, "sdpa"),
        ({"dtype": "bfloat16"}, (9, 4), "6.4", "sdpa"),
        ({"dtype": "bfloat16", "packing": False}, (9, 0), None, "sdpa"),
        ({"dtype": "float32"}, (9, 0), None, "sdpa"),
        ({"dtype": "bfloat16", "attention": "eager"}, (9, 0), None, "eager"),
    ],
)
def test_what_auto_stands_for(
    settings: dict[str, Any], capability: tuple[int, int], hip: str | None, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert attention.chosen(Learning(dtype="bfloat16")) == ("varlen" if varlen.runs_here() else "sdpa")
    card(monkeypatch, capability, hip)
    assert attention.chosen(Learning(**settings)) == kernel


def test_flash_comes_from_the_hub_where_the_package_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def get_kernel(name: str, *, version: int) -> Any:
        asked.append((name, version))
        return parts.module("flash_attn2", flash_attn_varlen_func=parts.flash_attn_varlen_func)

    monkeypatch.setitem(sys.modules, "kernels", parts.module("kernels", get_kernel=get_kernel))
    monkeypatch.setattr(varlen, "of_library", varlen.of_library.__wrapped__)
    segments = some_segments(4)
    mask = seen(segments)
    given = inputs(len(mask))
    found = attention.KERNELS["flash"](*given, 0.3, lay_out(segments, "flash"))
    torch.testing.assert_close(found.double(), exact(*given, 0.3, mask), rtol=0, atol=2e-6)
    from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK

    assert asked == [("kernels-community/flash-attn2", 3)]
    assert FLASH_ATTN_KERNEL_FALLBACK["flash_attention_2"] == asked[0][0]


def test_a_hub_that_is_out_of_reach_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_kernel(name: str, *, version: int) -> Any:
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "kernels", parts.module("kernels", get_kernel=get_kernel))
    monkeypatch.setattr(varlen, "of_library", varlen.of_library.__wrapped__)
    with pytest.raises(
        RequestError, match=r"can't be had .*: no route to host; install flash-attn, or take varlen"
    ) as told:
        attention.refuse_missing(Learning(attention="flash", dtype="bfloat16"))
    assert "\n" not in str(told.value)


def test_heads_that_are_too_wide_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    parts.put_in_place(monkeypatch)
    with pytest.raises(RequestError, match=r"heads are 512 wide, .* set learning\.attention=sdpa"):
        attention.KERNELS["varlen"](*inputs(3, size=512), 0.3, lay_out([(3, -1)], "varlen"))


def test_rounding_is_told_from_a_leak() -> None:
    """In bfloat16: 0.4 nats are rounding where two plain kernels differ by 0.15, and a leak where they don't."""
    settings = Learning(dtype="bfloat16", attention="sdpa")
    alone, packed = [torch.zeros(3), torch.zeros(2)], torch.tensor([[0.0, 0.4, 0.0], [0.0, 0.1, 9.0]])
    rounded = [torch.tensor([0.0, 0.0, -0.15]), torch.zeros(2)]
    attention.refuse_difference(packed, alone, rounded, settings, Path("policy"))
    with pytest.raises(RequestError, match=r"differ by 0.4 nats a token .*learning.attention=sdpa"):
        attention.refuse_difference(packed, alone, alone, settings, Path("policy"))
    with pytest.raises(RequestError, match="differ by nan"):
        attention.refuse_difference(packed * float("nan"), alone, rounded, settings, Path("policy"))
