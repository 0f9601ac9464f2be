"""Gradients summed over many passes: `python -m benchmarks.learner.accumulation`.

A random bfloat16 policy makes passes of random tokens in DeepSpeed's engine, configured by the learner, and once more
with bfloat16 accumulation, which is DeepSpeed's default. The sum is compared with the float64 sum of the same passes'
gradients: |sum - exact| / |exact|.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.learner.parts import join_ranks, machine, random_policy
from pipeline.recipe import ColdStart, Learning
from trainer import engine as engines
from trainer.policy import load_policy

SHAPE = ColdStart(vocabulary=300, hidden=64, layers=2, heads=4, kv_heads=2, head_dim=16, mlp=128)
PASSES = (16, 64, 256)
TOKENS = 32


def gradients(engine: Any, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(the engine's sum over `count` passes, the float64 sum of each pass's gradients), flattened."""
    from deepspeed.utils import safe_get_full_grad

    plain = load_policy(engine.module.folder, torch.bfloat16)
    exact = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in plain.named_parameters()}
    torch.manual_seed(1)
    for number in range(count):
        ids = torch.randint(3, 250, (1, TOKENS))
        plain.zero_grad()
        loss_of(plain, ids).backward()
        for name, p in plain.named_parameters():
            exact[name] += p.grad.double()
        engine.set_gradient_accumulation_boundary(number == count - 1)
        engine.backward(engine(ids))
        if number < count - 1:
            engine.step()
    found = {name: safe_get_full_grad(p) for name, p in engine.module.model.named_parameters()}
    return tuple(torch.cat([values[name].double().flatten() for name in exact]) for values in (found, exact))  # type: ignore[return-value]


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids).logits.float()
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])


class Loss(torch.nn.Module):
    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.model = load_policy(folder, torch.bfloat16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return loss_of(self.model, ids)


def error(folder: Path, stage: int, in_bfloat16: bool, count: int) -> float:
    import deepspeed

    settings = Learning(dtype="bfloat16", zero_stage=stage, clip=1e9)
    config = engines.deepspeed_config(settings)
    if in_bfloat16:
        del config["data_types"], config["communication_data_type"]
    loss = Loss(folder)
    optimizer = torch.optim.AdamW(loss.parameters(), lr=0.0, fused=True)
    engine, *_ = deepspeed.initialize(model=loss, optimizer=optimizer, config=config)
    found, exact = gradients(engine, count)
    engine.destroy()
    return float((found - exact).norm() / exact.norm())


def main() -> None:
    join_ranks()
    torch.set_num_threads(1)
    print(machine())
    print(f"{'passes':>8}" + "".join(f"  ZeRO {stage}: bfloat16   float32" for stage in (1, 2, 3)))
    with tempfile.TemporaryDirectory() as name:
        folder = random_policy(Path(name), SHAPE, spread=0.02)
        for count in PASSES:
            errors = [error(folder, stage, half, count) for stage in (1, 2, 3) for half in (True, False)]
            print(f"{count:8}" + "".join(f"{value:{18 - 8 * (n % 2)}.1e}" for n, value in enumerate(errors)))


if __name__ == "__main__":
    main()
