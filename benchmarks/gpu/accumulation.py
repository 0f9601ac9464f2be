"""What is lost where a step's gradient is the sum of many passes': the engine's own sum against a float64 one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.policies import Scale, engine_of, examples_of, laid_out, learn, recipe
from benchmarks.gpu.report import Section
from trainer.passes import Pass

LOST = 1e-4
"""Relative error of the sum of the most passes; float32 keeps far below it, bfloat16 can't."""


def measure(section: Section, scale: Scale) -> None:
    counts = (4, 16) if scale.small else (16, 64, 256)
    bound = section.expect(f"relative error of the engine's sum of {counts[-1]} passes", "at most", LOST)
    # Each pass a sequence alone, without packing: nothing in it adds up in an order of its own, so that the gradient
    # of a pass is the same each time. The rate is nothing, so that weights stay; Adam's first moment is the gradient.
    tokens = 24 if scale.small else 96
    settings = recipe(tokens, learning_rate=0.0, adam_beta1=0.0, clip=0.0, packing=False, attention="sdpa")

    def compared() -> None:
        with engine_of(scale.probe, settings) as engine:
            seeds, words = range(counts[-1]), scale.probe.vocabulary
            passes = [laid_out(examples_of("one sequence", tokens, words, seed), None) for seed in seeds]
            gradients = _alone(engine, passes, settings.learning)
            for count, exact, rounded in _sums(gradients, counts):
                found = _gradient(engine, passes[:count], settings.learning)
                error = _apart(found, exact)
                section.add(f"{count} passes", engine=error, bfloat16=_apart(rounded, exact))
            bound.meet(error)

    section.steps({"accumulation": compared})


def _gradient(engine: Any, passes: list[Pass], learning: Any) -> Tensor:
    """The gradient that the optimizer is given for these passes, all weights in a row, float32."""
    from deepspeed.utils import safe_get_full_optimizer_state

    for number, taken in enumerate(passes):
        engine.set_gradient_accumulation_boundary(number == len(passes) - 1)
        learn(engine, taken, learning, engine.backward, 1)
        engine.step()
    return torch.cat([safe_get_full_optimizer_state(p, "exp_avg").flatten() for p in engine.module.parameters()])


def _alone(engine: Any, passes: list[Pass], learning: Any) -> Iterator[Tensor]:
    for taken in passes:
        yield _gradient(engine, [taken], learning)


def _sums(gradients: Iterator[Tensor], counts: tuple[int, ...]) -> list[tuple[int, Tensor, Tensor]]:
    """After each count: the sum in float64, and the sum that bfloat16 makes of the same numbers."""
    found = []
    exact = rounded = None
    for number, gradient in enumerate(gradients, start=1):
        exact = gradient.double() if exact is None else exact + gradient.double()
        rounded = gradient.bfloat16() if rounded is None else rounded + gradient.bfloat16()
        if number in counts:
            found.append((number, exact.clone(), rounded.clone()))
    return found


def _apart(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()
