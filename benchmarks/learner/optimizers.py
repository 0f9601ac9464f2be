"""AdamW's three implementations in torch on the host: `python -m benchmarks.learner.optimizers`.

Weights a second and thread of a step on float32 weights, the best of some; one after another in one process. Fused is
what the learner uses, on the host (with `learning.offload`) and on cards; the for-loop is what torch takes on a CPU by
itself.
"""

from __future__ import annotations

import time

import torch

from benchmarks.gpu.optimizer import WAYS
from benchmarks.learner.parts import machine


def weights_a_second(options: dict[str, bool], weights: int, steps: int = 5) -> float:
    parameter = torch.nn.Parameter(torch.ones(weights))
    parameter.grad = torch.full((weights,), 0.1)
    optimizer = torch.optim.AdamW([parameter], lr=1e-6, **options)
    optimizer.step()
    best = float("inf")
    for _ in range(steps):
        began = time.perf_counter()
        optimizer.step()
        best = min(best, time.perf_counter() - began)
    return weights / best


def main() -> None:
    torch.set_num_threads(1)
    print(machine())
    found = {kind: weights_a_second(options, 20_000_000) for kind, options in WAYS.items()}
    for kind, rate in found.items():
        print(f"{kind:10} {rate / 1e6:8,.0f} million weights a second, {rate / found['for loop']:6.1f} x")


if __name__ == "__main__":
    main()
