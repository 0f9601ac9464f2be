"""Packed passes against each sequence alone, loss and gradients, both held against float64."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu.device import device
from benchmarks.gpu.policies import Scale, example, learn, make, recipe, refusal
from benchmarks.gpu.report import Section
from pipeline.recipe import Learning
from trainer.attention import KERNELS, register
from trainer.engine import Scored
from trainer.packing import Layout, lay_out
from trainer.passes import Pass, collate
from trainer.transfer import Packed
from trainer.view import Example

TIMES = 2.0
"""How much further from float64 a packed pass may be than its sequences alone, which round as well."""
FLOOR = {"float32": 2e-6, "bfloat16": 1e-3}
"""Relative; where sequences alone happen to be nearly exact."""
LEAST = 3.0
"""A planted leak must be this many times past what is allowed, or the comparison could not see one."""


Found = tuple[Tensor, Tensor, dict[str, Tensor]]
"""Log-probabilities, loss and gradients, float64."""


@dataclass(frozen=True, slots=True)
class Errors:
    """Relative to float64, in the norm over all that is compared."""

    logprobs: float
    loss: float
    gradients: float


def measure(section: Section, scale: Scale) -> None:
    cases: dict[str, Callable[[], None]] = {}
    for name in ("float32", "bfloat16"):
        given = functools.cache(functools.partial(_given, scale, name))
        for kernel in KERNELS:
            reason = refusal(kernel, name)
            if reason is not None:
                section.leave_out(f"{kernel}, {name}", reason)
                continue
            cases[f"{kernel}, {name}"] = _case(section, given, kernel, name)
        cases[f"a planted leak, {name}"] = _planted(section, given, name)
    section.steps(cases)


def _case(section: Section, given: Callable[[], Given], kernel: str, name: str) -> Callable[[], None]:
    bounds = {
        part: section.expect(f"{kernel}, {name}: {part}' error over what is allowed", "at most", 1.0)
        for part in ("logprobs", "gradients")
    }

    def compared() -> None:
        packed, alone = _told(section, f"{kernel}, {name}", given(), kernel)
        for part, bound in bounds.items():
            bound.meet(getattr(packed, part) / allowed(getattr(alone, part), name))

    return compared


def _planted(section: Section, given: Callable[[], Given], name: str) -> Callable[[], None]:
    bound = section.expect(f"a planted leak, {name}: gradients' error over what is allowed", "at least", LEAST)

    def compared() -> None:
        with leaking("eager"):
            packed, alone = _told(section, f"a planted leak, {name}", given(), "eager")
        bound.meet(packed.gradients / allowed(alone.gradients, name))

    return compared


def allowed(alone: float, name: str) -> float:
    return TIMES * alone + FLOOR[name]


@contextmanager
def leaking(kernel: str) -> Iterator[None]:
    """That kernel attends across boundaries for the time being: causal over the whole stream."""
    real = KERNELS[kernel]

    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float, _layout: Layout) -> Tensor:
        whole = Packed(lay_out([(query.shape[0], -1)], kernel), pin=query.is_cuda).on(query.device)
        return real(query, key, value, scale, whole)

    KERNELS[kernel] = attend
    try:
        yield
    finally:
        KERNELS[kernel] = real
        register(kernel)


@dataclass(frozen=True, slots=True)
class Given:
    """A policy in one dtype, some completions, and what is right of them."""

    model: Any
    examples: list[Example]
    groups: list[int]
    learning: Learning
    exact: Found
    alone: Found
    """Of the sequences one by one, under plain attention, in that dtype."""


def _given(scale: Scale, name: str) -> Given:
    torch.manual_seed(0)
    model = make(scale.probe, getattr(torch, name), "sdpa", spread=0.1)
    examples, groups = _examples(scale)
    learning = recipe(4096, beta2=0.05, dtype=name).learning
    exact = _exact(copy.deepcopy(model).double(), examples, learning)
    alone = _found(model, [collate([one], [0], 0, None).to(device()) for one in examples], learning, len(examples))
    return Given(model, examples, groups, learning, exact, alone)


def _told(section: Section, what: str, given: Given, kernel: str) -> tuple[Errors, Errors]:
    """Errors of the completions in one packed pass, and of each alone."""
    given.model.set_attn_implementation(register(kernel))
    whole = collate(given.examples, given.groups, 0, kernel).to(device())
    packed = _errors(_found(given.model, [whole], given.learning, len(given.examples)), given.exact)
    alone = _errors(given.alone, given.exact)
    section.add(
        what,
        logprobs=packed.logprobs, alone_logprobs=alone.logprobs, loss=packed.loss, alone_loss=alone.loss,
        gradients=packed.gradients, alone_gradients=alone.gradients,
    )  # fmt: skip
    return packed, alone


def _examples(scale: Scale) -> tuple[list[Example], list[int]]:
    """Groups of unlike lengths, a completion of a single token among them; on a card longer than a kernel's block."""
    rng = np.random.default_rng(1)
    shape, times = scale.probe, 1 if scale.small else 7
    made, groups = [], []
    for group, (prompt, completions) in enumerate([(19, (5, 61, 18)), (33, (40,)), (8, (27,))]):
        tokens = rng.integers(3, shape.vocabulary, prompt * times).astype(np.int32)
        lengths = [length * times for length in completions] + [1] * (group == 0)
        made += [example(tokens, length, shape.vocabulary, rng) for length in lengths]
        groups += [group] * len(lengths)
    return made, groups


def _found(model: Any, passes: Sequence[Pass], learning: Learning, count: int) -> Found:
    """Through the learner's module and loss; gradients of several passes are summed in float64."""
    module = Scored(model, 1.0)
    gradients = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in model.named_parameters()}
    logprobs, loss = [], torch.zeros((), dtype=torch.float64, device=device())
    for taken in passes:
        said: list[Tensor] = []
        module.register_forward_hook(lambda _module, _inputs, found, said=said: said.append(found.detach()))

        def backward(found: Tensor) -> None:
            nonlocal loss
            loss = loss + found.detach().double()
            found.backward()  # type: ignore[no-untyped-call]

        model.zero_grad(set_to_none=True)
        learn(module, taken, learning, backward, count)
        logprobs.append(said[0].double())
        for name, weight in model.named_parameters():
            gradients[name] += weight.grad.double()
    model.zero_grad(set_to_none=True)
    return torch.cat(logprobs), loss, gradients


def _exact(model: Any, examples: Sequence[Example], learning: Learning) -> Found:
    """The same in float64 without a line of ours: each sequence alone, all logits, the loss as the paper writes it."""
    logprobs, loss = [], torch.zeros((), dtype=torch.float64, device=device())
    for one in examples:
        prompt, completion = (
            torch.from_numpy(part.astype(np.int64)).to(device()) for part in (one.prompt_tokens, one.completion_tokens)
        )
        logits = model(input_ids=torch.cat([prompt, completion])[None], use_cache=False).logits[0]
        said = logits[len(prompt) - 1 : -1].log_softmax(dim=-1).gather(-1, completion[:, None]).squeeze(-1)
        behaviour = torch.from_numpy(one.behaviour).to(device()).double()
        loss = loss + (learning.beta2 * (said - behaviour).sum() - one.advantage).square() / len(examples)
        logprobs.append(said.detach())
    loss.backward()  # type: ignore[no-untyped-call]
    return torch.cat(logprobs), loss.detach(), {name: weight.grad for name, weight in model.named_parameters()}


def _errors(found: Found, exact: Found) -> Errors:
    names = list(exact[2])
    gradients = [torch.cat([told[2][name].flatten() for name in names]) for told in (found, exact)]
    return Errors(_apart(found[0], exact[0]), _apart(found[1], exact[1]), _apart(gradients[0], gradients[1]))


def _apart(found: Tensor, exact: Tensor) -> float:
    return ((found - exact).norm() / exact.norm()).item()
