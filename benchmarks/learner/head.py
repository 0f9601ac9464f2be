"""The head: how far each way of making log-probabilities is from float64, and its time beside it.

    python benchmarks/learner/head.py [--tokens 1024] [--vocabulary 16384] [--width 1024] [--repeat 3]

Operands are bfloat16, as a policy in bfloat16 has them; float64 is computed from these very numbers. Errors: of a
token's log-probability, mean and largest, in nats; relative, of the gradient for hidden and for the weight. Each is
timed forward and backward, the ways in turn, the best of `--repeat`; ratios are to `before`.

- `before`: logits rounded to bfloat16, softmax and the weight's gradient in float32 (as the learner did).
- `now`: logits in float32. On a card from bfloat16 operands, on a CPU from float32 copies of them.
- `as on a card`: what the card's products compute, on a CPU stood in for by float32 products of rounded operands; its
  time there means nothing, and is not told.
- `float32`: weights and hidden taken to float32, all logits at once, and no gradient rounded.
- `bfloat16 logits`: PyTorch's own, all of it in bfloat16 but for the softmax, which is what fused heads compute that
  keep logits in the operands' dtype (Liger's fused_linear_cross_entropy by its source).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from trainer import logprobs
from trainer.logprobs import token_logprobs

TEMPERATURE = 0.7
Way = Callable[[torch.nn.Linear, Tensor, Tensor], Tensor]


class Before(torch.autograd.Function):
    """The learner's function as it was, all rows in one chunk."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        scaled = (hidden @ weight.t()).float().div_(TEMPERATURE)
        totals = scaled.logsumexp(-1)
        ctx.save_for_backward(hidden, weight, targets, totals, scaled)
        return scaled.gather(-1, targets[:, None]).squeeze(-1) - totals

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        hidden, weight, targets, totals, scaled = ctx.saved_tensors
        each = (gradient / TEMPERATURE)[:, None]
        made = torch.sub(scaled, totals[:, None]).exp_().mul_(-each).scatter_add_(-1, targets[:, None], each)
        return made.to(weight.dtype) @ weight, (made.t() @ hidden.float()).to(weight.dtype), None


def before(head: torch.nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    return Before.apply(hidden, head.weight, targets)  # type: ignore[no-any-return, no-untyped-call]


def now(head: torch.nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    return token_logprobs(head, hidden, targets, TEMPERATURE)


def float32(head: torch.nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = hidden.float() @ head.weight.float().t() / TEMPERATURE
    return torch.log_softmax(logits, -1).gather(-1, targets[:, None]).squeeze(-1)


def bfloat16(head: torch.nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = head(hidden) / TEMPERATURE
    return torch.log_softmax(logits, -1, dtype=torch.float32).gather(-1, targets[:, None]).squeeze(-1)


def in_float64(
    head: torch.nn.Linear, hidden: Tensor, targets: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    weight, values = head.weight.detach().double().requires_grad_(), hidden.detach().double().requires_grad_()
    found = torch.log_softmax(values @ weight.t() / TEMPERATURE, -1).gather(-1, targets[:, None]).squeeze(-1)
    (found * weights.double()).sum().backward()
    assert values.grad is not None and weight.grad is not None
    return found.detach(), values.grad, weight.grad


class AsOnACard:
    """PyTorch's matrix products with `out_dtype`, which a CPU lacks."""

    def __enter__(self) -> None:
        self.kept = torch.mm, torch.addmm, logprobs._operand
        multiply, add, _ = self.kept
        torch.mm = lambda left, right, out_dtype: multiply(left.float(), right.float())  # type: ignore[assignment]
        torch.addmm = lambda total, left, right, out_dtype, out: out.copy_(  # type: ignore[assignment]
            add(total, left.float(), right.float())
        )
        logprobs._operand = lambda weight, exact: weight

    def __exit__(self, *_: object) -> None:
        torch.mm, torch.addmm, logprobs._operand = self.kept  # type: ignore[assignment]


def once(
    way: Way, head: torch.nn.Linear, hidden: Tensor, targets: Tensor, weights: Tensor
) -> tuple[list[Tensor], float]:
    """Log-probabilities and both gradients, and the seconds that they took."""
    hidden.grad = head.weight.grad = None
    settle(hidden)
    started = time.perf_counter()
    found = way(head, hidden, targets)
    (found * weights).sum().backward()
    settle(hidden)
    took = time.perf_counter() - started
    assert hidden.grad is not None and head.weight.grad is not None
    return [found.detach(), hidden.grad, head.weight.grad], took


def settle(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def apart(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("tokens", 1024), ("vocabulary", 16_384), ("width", 1024), ("repeat", 3)):
        parser.add_argument(f"--{name}", type=int, default=value)
    told = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    head = torch.nn.Linear(told.width, told.vocabulary, bias=False, dtype=torch.bfloat16, device=device)
    with torch.no_grad():  # logits of a standard deviation of 3, which a trained policy's are like
        head.weight.normal_(0, 3 * told.width**-0.5)
    hidden = torch.randn(told.tokens, told.width, device=device).bfloat16().requires_grad_()
    targets = torch.randint(0, told.vocabulary, (told.tokens,), device=device)
    weights = torch.randn(told.tokens, device=device)
    exact = in_float64(head, hidden, targets, weights)
    ways: dict[str, Way] = {"before": before, "now": now, "float32": float32, "bfloat16 logits": bfloat16}
    best = dict.fromkeys(ways, float("inf"))
    made: dict[str, list[Tensor]] = {}
    for _ in range(told.repeat):
        for name, way in ways.items():
            made[name], took = once(way, head, hidden, targets, weights)
            best[name] = min(best[name], took)
    if device == "cpu":
        with AsOnACard():
            made["as on a card"], _ = once(now, head, hidden, targets, weights)
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}; {told.tokens:,} tokens, {told.vocabulary:,} words, width {told.width:,}, bfloat16 operands\n")
    print(
        "| | log-probability, nats: mean, largest | hidden's gradient | weight's gradient | seconds |\n"
        "|---|---|---|---|---|"
    )
    for name, (found, for_hidden, for_weight) in made.items():
        errors = (found.double() - exact[0]).abs()
        seconds = f"{best[name]:.2f} ({best[name] / best['before']:.2f})" if name in best else ""
        print(
            f"| {name} | {errors.mean():.1e}, {errors.max():.1e} | {apart(for_hidden, exact[1]):.1e} | "
            f"{apart(for_weight, exact[2]):.1e} | {seconds} |"
        )


if __name__ == "__main__":
    main()
