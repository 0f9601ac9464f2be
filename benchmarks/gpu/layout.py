"""What it costs to tell attention who sees whom, and attention itself, kernel by kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu import device as machine
from benchmarks.gpu.policies import MIXES, Scale, amount_of, examples_of, refusal, usual_kernel
from benchmarks.gpu.report import Section
from trainer.attention import KERNELS
from trainer.blocks import mask_of
from trainer.passes import collate
from trainer.view import Example

SCORES = 8 << 30
"""Bytes of scores past which eager, which keeps all of them in float32 several times, is not asked for."""


def measure(section: Section, scale: Scale) -> None:
    cases: dict[str, Callable[[], None]] = {}
    kernels = list(dict.fromkeys([usual_kernel(), *KERNELS]))
    refused = {kernel: refusal(kernel, "bfloat16") for kernel in kernels}
    for kernel, reason in refused.items():
        if reason is not None:
            section.leave_out(kernel, reason)
    for tokens in scale.tokens:
        for kernel in (name for name in kernels if refused[name] is None):
            for mix in MIXES:
                what = f"{kernel}, {tokens:,} tokens, {mix}"
                examples = examples_of(mix, tokens, scale.shape.vocabulary)
                reason = _too_large(kernel, examples, scale)
                if reason is not None:
                    section.leave_out(what, reason)
                else:
                    cases[what] = _case(section, scale, what, kernel, examples)
    section.steps(cases)


def _too_large(kernel: str, examples: list[Example], scale: Scale) -> str | None:
    if kernel != "eager":
        return None
    rows = [len(one.prompt_tokens) + len(one.completion_tokens) for one in examples]
    scores = 4 * scale.shape.heads * sum(row * row for row in rows)
    return f"its scores take {scores / 2**30:.0f} GiB" if scores > SCORES else None


def _case(section: Section, scale: Scale, what: str, kernel: str, examples: list[Example]) -> Callable[[], None]:
    def measured() -> None:
        shape = scale.shape
        host = machine.median(lambda: collate(examples, [0] * len(examples), 0, kernel), scale.repeat)
        made = collate(examples, [0] * len(examples), 0, kernel)
        moved = machine.median(lambda: made.to(machine.device()), scale.repeat)
        taken = made.to(machine.device())
        assert taken.layout is not None
        built = _mask(taken.layout)
        query, key, value = _heads(taken.ids.numel(), shape)
        attend = KERNELS[kernel]

        def forward() -> Any:
            return attend(query, key, value, shape.head_dim**-0.5, taken.layout)

        def both() -> None:
            found = forward()
            found.backward(torch.ones_like(found))
            query.grad = key.grad = value.grad = None

        first = machine.timed(both)
        with torch.no_grad():
            ahead = machine.median(forward, scale.repeat)
        whole, memory = machine.median(both, scale.repeat), machine.peak_above(both)
        work = 12 * shape.query * amount_of(examples).pairs
        section.add(
            what,
            lay_out_ms=1e3 * host, to_device_ms=1e3 * moved, mask_ms=built.get("ms"), mask_gib=built.get("gib"),
            first_s=first, forward_ms=1e3 * ahead, forward_backward_ms=1e3 * whole, tflops=work / whole / 1e12,
            peak_gib=None if memory is None else memory / 2**30,
        )  # fmt: skip

    return measured


def _heads(tokens: int, shape: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    told: dict[str, Any] = {"device": machine.device(), "dtype": torch.bfloat16, "requires_grad": True}
    query, key, value = (
        torch.randn(tokens, heads, shape.head_dim, **told) for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    )
    return query, key, value


def _mask(layout: Any) -> dict[str, float | None]:
    """What making flex attention's mask of blocks takes; it is made once a pass. Empty for kernels without one."""
    if layout.segment is None:
        return {}
    seconds, memory = machine.timed(lambda: mask_of(layout)), None
    if machine.device().type != "cpu":
        memory = machine.peak_above(lambda: mask_of(dataclasses.replace(layout)))
    return {"ms": 1e3 * seconds, "gib": None if memory is None else memory / 2**30}
