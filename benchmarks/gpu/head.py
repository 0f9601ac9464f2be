"""Head and log-softmax at the real width and vocabulary: time, memory and rounding beside the plain way in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu.device import device, median, peak_above
from benchmarks.gpu.policies import Scale
from benchmarks.gpu.report import Bound, Section
from trainer.logprobs import token_logprobs

TIMES, FLOOR = 1.5, 1e-6
"""Ours may be so much further from float64 than the plain way, relatively; and this far whatever that is."""

Way = Callable[[torch.nn.Linear, Tensor, Tensor], Tensor]


def plain(head: torch.nn.Linear, hidden: Tensor, targets: Tensor, rows: int = 1024) -> Tensor:
    """PyTorch's own functions, chunk by chunk, the logits of each made again for the backward pass."""

    def chunk(part: Tensor, wanted: Tensor) -> Tensor:
        logits = F.linear(part, head.weight).float()
        return logits.log_softmax(dim=-1).gather(-1, wanted.unsqueeze(-1)).squeeze(-1)

    parts = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([checkpoint(chunk, part, wanted, use_reentrant=False) for part, wanted in parts])


def ours(head: torch.nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    return token_logprobs(head, hidden, targets, 1.0)


WAYS: dict[str, Way] = {"ours": ours, "plain": plain}


def measure(section: Section, scale: Scale) -> None:
    parts = ("logprobs", "gradients")
    bounds = {part: section.expect(f"{part}' error over what is allowed", "at most", 1.0) for part in parts}
    tokens = scale.tokens[1]
    head, hidden, targets, weighed = _given(scale, tokens)
    exact: list[tuple[Tensor, Tensor, Tensor]] = []
    errors: dict[str, tuple[float, float, float]] = {}
    cases: dict[str, Callable[[], None]] = {
        "float64": lambda: exact.append(in_float64(head.weight, hidden, targets, weighed))
    }

    def case(name: str) -> None:
        def work() -> Tensor:
            head.weight.grad = hidden.grad = None
            found = WAYS[name](head, hidden, targets)
            found.backward(weighed)
            return found.detach()

        memory, seconds = peak_above(work), median(work, scale.repeat)
        found = work()
        assert hidden.grad is not None and head.weight.grad is not None
        errors[name] = tuple(  # type: ignore[assignment]
            apart(told, true) for told, true in zip((found, hidden.grad, head.weight.grad), exact[0], strict=True)
        )
        section.add(
            f"{name}, {tokens:,} tokens", seconds=seconds, peak_gib=None if memory is None else memory / 2**30,
            logprobs=errors[name][0], hidden_gradient=errors[name][1], weight_gradient=errors[name][2],
            tflops=6 * tokens * head.weight.numel() / seconds / 1e12,
        )  # fmt: skip

    section.steps(cases | {name: (lambda name=name: case(name)) for name in WAYS})
    if len(errors) == len(WAYS):
        _judge(bounds, errors)
        section.save()


def _judge(bounds: dict[str, Bound], errors: dict[str, tuple[float, float, float]]) -> None:
    ratios = [own / (TIMES * other + FLOOR) for own, other in zip(errors["ours"], errors["plain"], strict=True)]
    bounds["logprobs"].meet(ratios[0])
    bounds["gradients"].meet(max(ratios[1:]))


def _given(scale: Scale, tokens: int) -> tuple[torch.nn.Linear, Tensor, Tensor, Tensor]:
    """Head, hidden states, targets and the gradients of their log-probabilities, in the recipe's dtype."""
    torch.manual_seed(0)
    told: dict[str, Any] = {"device": device(), "dtype": torch.bfloat16}
    head = torch.nn.Linear(scale.shape.hidden, scale.shape.vocabulary, bias=False, **told)
    torch.nn.init.normal_(head.weight, std=0.05)
    hidden = torch.randn(tokens, scale.shape.hidden, **told).requires_grad_()
    targets = torch.randint(scale.shape.vocabulary, (tokens,), device=device())
    return head, hidden, targets, torch.randn(tokens, device=device())


def in_float64(
    weight: Tensor, hidden: Tensor, targets: Tensor, weighed: Tensor, rows: int = 512
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities and the gradients of hidden states and weight, by the formula, in float64."""
    with torch.no_grad():
        exact = weight.double()
        logprobs, for_hidden, for_weight = [], [], torch.zeros_like(exact)
        for start in range(0, len(hidden), rows):
            part, wanted, each = (whole[start : start + rows] for whole in (hidden, targets, weighed))
            part, each = part.double(), each.double()
            logs = (part @ exact.t()).log_softmax(dim=-1)
            logprobs.append(logs.gather(-1, wanted.unsqueeze(-1)).squeeze(-1))
            made = logs.exp_().mul_(-each.unsqueeze(-1)).scatter_add_(-1, wanted.unsqueeze(-1), each.unsqueeze(-1))
            for_hidden.append(made @ exact)
            for_weight += made.t() @ part
        return torch.cat(logprobs), torch.cat(for_hidden), for_weight


def apart(found: Tensor, exact: Tensor) -> float:
    """Relative, in the norm over all of it."""
    return ((found.double() - exact).norm() / exact.norm()).item()
