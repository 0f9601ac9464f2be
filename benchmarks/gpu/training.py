"""Passes of the learner at the real sizes: tokens a second, share of the card's peak, memory against the plan."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu import device as machine
from benchmarks.gpu.policies import (
    MIXES,
    Scale,
    amount_of,
    engine_of,
    examples_of,
    laid_out,
    learn,
    recipe,
    scored,
    usual_kernel,
)
from benchmarks.gpu.report import Section, release
from pipeline.planning.memory import learner_memory
from pipeline.policies.shapes import Shape
from pipeline.recipe import Recipe
from trainer.arithmetic import of_model
from trainer.attention import register
from trainer.passes import Pass
from trainer.view import Example

GOAL = 0.40
"""Share of an H100's or H200's peak that a pass of the recipe's length reaches at the least, all layers."""
HOPPER = ("H100", "H200")
OFF = 0.10
"""How far, relatively, the plan's memory may be from what is measured."""
ENGINE_LAYERS = 12
"""With optimizer and float32 masters, 18 bytes a weight: what fits one card beside the activations."""


def measure(section: Section, scale: Scale) -> None:
    _Passes(section, scale).measure()


class _Passes:
    def __init__(self, section: Section, scale: Scale) -> None:
        self.section, self.scale, self.shape = section, scale, scale.shape
        self.kernel = usual_kernel()
        told = machine.describe(scale.small)
        self.best = machine.peak_rate(told["device"])
        goal = not scale.small and any(name in told["device"] for name in HOPPER)
        counted = not scale.small and torch.cuda.is_available()
        self.tokens = scale.tokens[1:]
        self.utilisation = {
            mix: section.expect(
                f"MFU, {self.shape.layers} layers, {self.tokens[0]:,} tokens, {mix}", "at least", GOAL,
                applies=goal, why=f"a goal for {' and '.join(HOPPER)}",
            )
            for mix in MIXES
        }  # fmt: skip
        self.memory = {
            what: section.expect(
                f"peak memory against the plan, {what}, {tokens:,} tokens, relative", "at most", OFF,
                applies=counted, why="an allocator on a CPU counts nothing",
            )
            for what in ("module", "engine") for tokens in self.tokens[:1]
        }  # fmt: skip

    def measure(self) -> None:
        with ExitStack() as held:
            module: list[Any] = []

            def load() -> None:
                module.append(scored(self.shape, recipe(self.tokens[0]).learning, self.kernel))

            self.section.steps({f"a policy of {self.shape.layers} layers": load})
            if module:
                self.section.steps(self._of_module(module[0]), reserve=8.0 if not self.scale.small else 0.0)
            module.clear()
            release()
            layers = min(ENGINE_LAYERS, self.shape.layers - 1)
            self._with_engine(held, replace(self.shape, layers=layers))

    def _of_module(self, module: Any) -> dict[str, Callable[[], None]]:
        """The plain module: all layers, no optimizer, since that does not fit one card."""
        cases: dict[str, Callable[[], None]] = {}
        kernels = list(dict.fromkeys([self.kernel, "sdpa"]))
        for tokens in self.tokens:
            for kernel in kernels:
                for mix in MIXES:
                    what = f"module, {self.shape.layers} layers, {tokens:,} tokens, {mix}, {kernel}"
                    cases[what] = functools.partial(self._module_case, module, tokens, mix, kernel, what)
        return cases

    def _module_case(self, module: Any, tokens: int, mix: str, kernel: str, what: str) -> None:
        settings = recipe(tokens, attention=kernel)
        module.model.set_attn_implementation(register(kernel))
        examples = examples_of(mix, tokens, self.shape.vocabulary)
        taken = laid_out(examples, kernel)

        def work() -> None:
            # Gradients stay, as in a step of several passes.
            learn(module, taken, settings.learning, torch.Tensor.backward, len(examples))

        first = machine.timed(work)
        machine.reset_peak()
        seconds = statistics.median(machine.timed(work) for _ in range(self.scale.repeat))
        planned = learner_memory(settings, self.shape, 0)
        # Of a plan, all but what an optimizer holds and needs.
        expected = replace(planned, optimizer=0.0, bucket=0.0, step=0.0, gathered=0.0).total(True)
        mfu = self._tell(what, module.model, examples, taken, seconds, expected, first_s=first)
        if kernel == self.kernel and tokens == self.tokens[0]:
            if mfu is not None and self.utilisation[mix].ok is not None:
                self.utilisation[mix].meet(mfu)
            self._hold_to_plan("module", expected)

    def _with_engine(self, held: ExitStack, shape: Shape) -> None:
        settings = recipe(self.tokens[0], attention=self.kernel)
        engine: list[Any] = []
        started = f"an engine of {shape.layers} layers"
        self.section.steps({started: lambda: engine.append(held.enter_context(engine_of(shape, settings)))})
        if not engine:
            return
        cases: dict[str, Callable[[], None]] = {}
        for tokens in self.tokens:
            for mix in MIXES:
                what = f"engine, {shape.layers} layers, {tokens:,} tokens, {mix}, {self.kernel}"
                cases[what] = functools.partial(self._engine_case, engine[0], shape, tokens, mix, what)
        self.section.steps(cases)

    def _engine_case(self, engine: Any, shape: Shape, tokens: int, mix: str, what: str) -> None:
        settings: Recipe = recipe(tokens, attention=self.kernel)
        examples = examples_of(mix, tokens, shape.vocabulary)
        taken = laid_out(examples, self.kernel)

        def work() -> None:
            engine.set_gradient_accumulation_boundary(True)
            learn(engine, taken, settings.learning, engine.backward, len(examples))

        first = machine.timed(work) + machine.timed(engine.step)
        machine.reset_peak()
        passes, steps = [], []
        for _ in range(self.scale.repeat):
            passes.append(machine.timed(work))
            steps.append(machine.timed(engine.step))
        expected = learner_memory(settings, shape, settings.learning.zero_stage).total(True)
        seconds = statistics.median(passes)
        self._tell(
            what,
            engine.module.model,
            examples,
            taken,
            seconds,
            expected,
            first_s=first,
            step_s=statistics.median(steps),
        )
        if tokens == self.tokens[0] and mix == MIXES[0]:
            self._hold_to_plan("engine", expected)

    def _tell(
        self,
        what: str,
        model: Any,
        examples: list[Example],
        taken: Pass,
        seconds: float,
        expected: float,
        **more: float,
    ) -> float | None:
        rate = flops(model, examples) / seconds
        mfu = rate / self.best if self.best else None
        peak = machine.peak()
        self.section.add(
            what,
            tokens_s=taken.ids.numel() / seconds, seconds=seconds, tflops=rate / 1e12, mfu=mfu,
            peak_gib=None if peak is None else peak / 2**30, planned_gib=expected / 2**30, **more,
        )  # fmt: skip
        return mfu

    def _hold_to_plan(self, what: str, expected: float) -> None:
        """The worst of the cases counts."""
        bound, peak = self.memory[what], machine.peak()
        if bound.ok is None or peak is None:
            return
        off = abs(peak - expected) / expected
        bound.meet(max(off, bound.value or 0.0))


def flops(model: Any, examples: list[Example]) -> float:
    """Arithmetic of a packed pass forward and backward, as the learner counts it for its MFU."""
    made = amount_of(examples)
    return of_model(model).of(made.positions, made.targets, made.pairs)
