"""AdamW's ways through the weights, on the card and, for offload, on the host: weights a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu.device import device, median
from benchmarks.gpu.policies import Scale
from benchmarks.gpu.report import Section

WAYS: dict[str, dict[str, bool]] = {
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "for loop": {"foreach": False, "fused": False},
}


def measure(section: Section, scale: Scale) -> None:
    places = list(dict.fromkeys([device(), torch.device("cpu")], None))
    cases: dict[str, Callable[[], None]] = {}
    for place in places:
        for name, told in WAYS.items():
            what = f"{name}, {place.type}"
            cases[what] = lambda place=place, told=told, what=what: _case(section, scale, place, told, what)
    section.steps(cases)


def _case(section: Section, scale: Scale, place: torch.device, told: dict[str, Any], what: str) -> None:
    """Float32 weights in the tensors of some layers, as the optimizer of an engine without ZeRO holds them."""
    shape = scale.shape
    layers = 1 if place.type == "cpu" else min(shape.layers, 4)
    sides = [(shape.hidden, shape.query), (shape.hidden, 2 * shape.key), (shape.query, shape.hidden)]
    sides += [(shape.hidden, shape.mlp)] * 3 + [(shape.hidden, 1)] * 2
    weights = [torch.zeros(side, device=place, requires_grad=True) for _ in range(layers) for side in sides]
    for weight in weights:
        weight.grad = torch.full_like(weight, 1e-3)
    optimizer = torch.optim.AdamW(weights, lr=1e-6, **told)
    seconds = median(optimizer.step, scale.repeat)
    count = sum(weight.numel() for weight in weights)
    section.add(what, weights=count, seconds=seconds, weights_s=count / seconds)
