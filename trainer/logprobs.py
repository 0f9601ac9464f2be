"""Log-probabilities of given tokens without the logits of all of them at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pipeline.logits import logit_rows

Head = Callable[[Tensor], Tensor]


def token_logprobs(head: Head, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """log softmax(head(hidden) / temperature) at `targets`: hidden [tokens, width], targets [tokens] -> [tokens].

    The projection is done chunk by chunk. The backward pass needs the logits again: those of the first chunks are
    kept, and those of the others are computed anew, so that memory is bounded however many tokens there are and however
    large the vocabulary is (`pipeline.logits`), and a pass that fits computes nothing twice. Logits, softmax and all
    sums are in float32 whatever the weights are. Nats.
    """
    return in_one_call(head, hidden, lambda call, inside: _in_chunks(head, call, inside, targets, temperature))


def with_entropy(head: Head, hidden: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`token_logprobs` and `sampled_entropy` of the same tokens, within one call of the head."""
    entropy: list[Tensor] = []

    def both(call: Head, inside: Tensor) -> Tensor:
        entropy.append(sampled_entropy(call, inside, temperature))
        return _in_chunks(head, call, inside, targets, temperature)

    return in_one_call(head, hidden, both), entropy[0]


def in_one_call(head: Head, hidden: Tensor, work: Callable[[Head, Tensor], Tensor]) -> Tensor:
    """`work(call, hidden)`, in which `call` is what the head computes and may be called any number of times.

    ZeRO-3 gathers the weight while the module is called, and each rank must make as many calls: one, whatever the
    number of chunks. So all of the work is done inside of it, by its hooks' leave.
    """
    if not hasattr(getattr(head, "weight", None), "ds_id"):
        return work(head, hidden)
    assert isinstance(head, torch.nn.Module)
    called = functools.partial(type(head).forward, head)
    head.forward = functools.partial(work, called)  # type: ignore[method-assign]
    try:
        found: Tensor = head(hidden)
    finally:
        del head.forward  # the class's own again
    return found


def _in_chunks(head: Any, call: Head, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
    memory = torch.cuda.get_device_properties(hidden.device).total_memory if hidden.is_cuda else None
    together = logit_rows(getattr(head, "out_features", 1 << 17), memory)
    rows, kept = together.chunk, together.kept
    if type(head) is torch.nn.Linear and head.bias is None:
        found: Tensor = Project.apply(hidden, head.weight, targets, temperature, rows, kept)  # type: ignore[no-untyped-call]
        return found
    # A head with a bias or an adapter.
    parts = []
    for start in range(0, max(1, hidden.shape[0]), rows):
        part = hidden[start : start + rows], targets[start : start + rows]
        if torch.is_grad_enabled() and start >= kept:
            parts.append(checkpoint(_logprobs, call, *part, temperature, use_reentrant=False, preserve_rng_state=False))
        else:
            parts.append(_logprobs(call, *part, temperature))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def sampled_entropy(head: Head, hidden: Tensor, temperature: float, most: int = 64) -> Tensor:
    """Entropy of softmax(head(hidden) / temperature) at up to `most` evenly spaced tokens -> [sum of nats, tokens].

    hidden [tokens, width]; no gradient. A sample, since the whole would cost another pass over the vocabulary.
    """
    with torch.no_grad():
        stride = -(-max(1, hidden.shape[0]) // most)
        logits = head(hidden[::stride])
        logs = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=-1)
        entropy = -(logs.exp() * logs).sum(dim=-1)
        return torch.stack([entropy.sum(), torch.full_like(entropy.sum(), len(entropy))])


def _logprobs(head: Head, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
    logits = head(hidden)
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    return scaled.gather(-1, targets.unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(dim=-1)


class Project(torch.autograd.Function):
    """Projection and log-softmax at the targets in one: hidden [tokens, width], weight [vocabulary, width] -> [tokens].

    PyTorch's own way keeps the logits and their log-softmax, and adds up a gradient of the whole weight for each
    chunk. Here one buffer serves all chunks that are not kept, the gradient `(onehot - softmax) / temperature` is
    made in another, and the weight's gradient is summed where it lies.

    Matrix products of bfloat16 weights have float32 sums and results. On a card the operands stay bfloat16, the logits'
    gradient rounded to it; on a CPU, whose products would round their results, they are taken to float32 before.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, rows: int, kept: int
    ) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        tokens = hidden.shape[0]
        found, totals = hidden.new_empty(tokens, dtype=exact), hidden.new_empty(tokens, dtype=exact)
        needed = any(ctx.needs_input_grad)
        work = hidden.new_empty(min(rows, tokens), weight.shape[0], dtype=exact)
        operand = _operand(weight, exact)
        ctx.kept = []
        for start in range(0, tokens, rows):
            part = slice(start, start + rows)
            scaled = _scaled(hidden[part], operand, temperature, exact)
            best = scaled.amax(dim=-1, keepdim=True)
            exponentials = torch.sub(scaled, best, out=work[: scaled.shape[0]]).exp_()
            totals[part] = best.squeeze(-1) + exponentials.sum(dim=-1).log()
            found[part] = scaled.gather(-1, targets[part].unsqueeze(-1)).squeeze(-1)
            if needed and start < kept:
                ctx.kept.append(scaled)
        ctx.save_for_backward(hidden, weight, targets, totals)
        ctx.temperature, ctx.rows = temperature, rows
        return found - totals

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, totals = ctx.saved_tensors
        tokens, rows, exact = hidden.shape[0], ctx.rows, totals.dtype
        for_hidden = torch.empty_like(hidden)
        # Sums over tokens are float32 where the weight is not.
        for_weight = torch.zeros_like(weight, dtype=exact) if ctx.needs_input_grad[1] else None
        work = hidden.new_empty(min(rows, tokens), weight.shape[0], dtype=exact)
        operand = _operand(weight, exact)
        each = (gradient / ctx.temperature).unsqueeze(-1)  # [tokens, 1]
        for number, start in enumerate(range(0, tokens, rows)):
            part = slice(start, start + rows)
            again = number >= len(ctx.kept)
            scaled = _scaled(hidden[part], operand, ctx.temperature, exact) if again else ctx.kept[number]
            made = torch.sub(scaled, totals[part].unsqueeze(-1), out=work[: scaled.shape[0]])
            made.exp_().mul_(-each[part]).scatter_add_(-1, targets[part].unsqueeze(-1), each[part])
            made = made.to(operand.dtype)
            for_hidden[part] = _product(made, operand, exact)
            if for_weight is not None:
                _add_product(for_weight, made.t(), hidden[part].to(operand.dtype))
        return for_hidden, for_weight if for_weight is None else for_weight.to(weight.dtype), None, None, None, None


def _scaled(hidden: Tensor, operand: Tensor, temperature: float, exact: torch.dtype) -> Tensor:
    """Logits over the temperature, at least float32, in memory of their own. [tokens, vocabulary]"""
    logits = _product(hidden.to(operand.dtype), operand.t(), exact)
    return logits if temperature == 1 else logits.div_(temperature)


def _operand(weight: Tensor, exact: torch.dtype) -> Tensor:
    """As the products take it. A CPU knows no product of bfloat16 with a float32 result, so the weight is made float32
    there, once a pass, which its gradient is anyway."""
    return weight if weight.is_cuda else weight.to(exact)


def _product(left: Tensor, right: Tensor, exact: torch.dtype) -> Tensor:
    """left @ right, matrices of one dtype, in `exact`: cuBLAS sums in float32, and its result is not rounded."""
    return left @ right if left.dtype == exact else torch.mm(left, right, out_dtype=exact)


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in total's dtype, where it lies."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
