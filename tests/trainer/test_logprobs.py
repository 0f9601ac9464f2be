"""Log-probabilities in chunks: exact, differentiable, and bounded in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from pipeline import logits
from trainer import logprobs
from trainer.logprobs import sampled_entropy, token_logprobs

Head = Callable[[torch.nn.Linear], torch.nn.Module]


@pytest.fixture(params=["all kept", "some kept", "none kept"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks of three tokens, of which all, two or none are kept for the backward pass."""
    monkeypatch.setattr(logits, "CHUNK_ELEMENTS", 3 * 11)
    kept = {"all kept": 100, "some kept": 2, "none kept": 0}[request.param]
    monkeypatch.setattr(logits, "KEPT_ELEMENTS", kept * 3 * 11)
    yield


@pytest.fixture(params=["in one", "module by module"])
def way(request: pytest.FixtureRequest) -> Head:
    """A plain head, and one with a life of its own (a bias, an adapter, hooks): the latter is called, never opened."""
    return {"in one": lambda head: head, "module by module": Called}[request.param]


class Called(torch.nn.Module):
    def __init__(self, head: torch.nn.Linear) -> None:
        super().__init__()
        self.head, self.out_features = head, head.out_features

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.head(hidden)


def parts(dtype: torch.dtype) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = torch.nn.Linear(5, 11, bias=False, dtype=dtype)
    hidden = torch.randn(14, 5, dtype=dtype, requires_grad=True)
    return head, hidden, torch.randint(0, 11, (14,))


def test_gradcheck(chunked: None, way: Head) -> None:
    head, hidden, targets = parts(torch.float64)
    whole = Whole(way(head), targets)
    (name,) = dict(whole.named_parameters())

    def through(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(whole, {name: weight}, (values,))

    assert torch.autograd.gradcheck(through, (hidden, head.weight.detach().requires_grad_()))


class Whole(torch.nn.Module):
    def __init__(self, head: torch.nn.Module, targets: torch.Tensor) -> None:
        super().__init__()
        self.head, self.targets = head, targets

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return token_logprobs(self.head, hidden, self.targets, 0.6)


def test_it_equals_all_logits_at_once(chunked: None, way: Head) -> None:
    head, hidden, targets = parts(torch.float32)
    weights = torch.randn(14)
    found = token_logprobs(way(head), hidden, targets, 0.6)
    (found * weights).sum().backward()
    mine = hidden.grad, head.weight.grad
    hidden.grad = head.weight.grad = None
    whole = torch.log_softmax(head(hidden).double() / 0.6, dim=-1)[torch.arange(14), targets]
    (whole * weights).sum().backward()
    torch.testing.assert_close(found, whole.float(), rtol=0, atol=1e-6)
    torch.testing.assert_close(mine[0], hidden.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mine[1], head.weight.grad, rtol=1e-5, atol=1e-6)


def test_bfloat16_weights_sum_in_float32() -> None:
    """Logits of bfloat16 weights are not rounded; the softmax of 20,000 would be off by far in eight bits."""
    head, hidden, targets = of_bfloat16()
    found = token_logprobs(head, hidden, targets, 0.7)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), in_float64(head, hidden, targets)[0], rtol=0, atol=1e-5)


def of_bfloat16() -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = torch.nn.Linear(16, 20_000, bias=False, dtype=torch.bfloat16)
    hidden = torch.randn(3, 16).bfloat16().requires_grad_()
    return head, hidden, torch.tensor([0, 5, 19_999])


def in_float64(
    head: torch.nn.Linear, hidden: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities at temperature 0.7, and gradients of their sum for hidden and weight."""
    weight, values = head.weight.detach().double().requires_grad_(), hidden.detach().double().requires_grad_()
    exact = torch.log_softmax(values @ weight.t() / 0.7, dim=-1)[torch.arange(len(targets)), targets]
    exact.sum().backward()
    assert values.grad is not None and weight.grad is not None
    return exact.detach(), values.grad, weight.grad


@pytest.mark.parametrize("where", ["on a CPU", "as on a card"])
def test_bfloat16_gradients(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right but for one rounding to bfloat16 of what comes out; on a card the logits' gradient is rounded before, too.

    A card's products are stood in for by what PyTorch says of `out_dtype`: operands in bfloat16, sums in float32.
    """
    head, hidden, targets = of_bfloat16()
    if where == "as on a card":
        multiply, add = torch.mm, torch.addmm

        def mm(left: torch.Tensor, right: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:
            assert left.dtype == right.dtype == torch.bfloat16 and out_dtype == torch.float32
            return multiply(left.float(), right.float())

        def addmm(
            total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, out_dtype: torch.dtype, out: torch.Tensor
        ) -> torch.Tensor:
            assert left.dtype == right.dtype == torch.bfloat16 and total.dtype == out_dtype == torch.float32
            return out.copy_(add(total, left.float(), right.float()))

        monkeypatch.setattr(torch, "mm", mm)
        monkeypatch.setattr(torch, "addmm", addmm)
        monkeypatch.setattr(logprobs, "_operand", lambda weight, exact: weight)
    found = token_logprobs(head, hidden, targets, 0.7)
    found.sum().backward()
    wanted = in_float64(head, hidden, targets)
    torch.testing.assert_close(found.double(), wanted[0], rtol=0, atol=1e-5)
    for mine, right in zip((hidden.grad, head.weight.grad), wanted[1:], strict=True):
        assert mine is not None and mine.dtype == torch.bfloat16
        apart = (mine.double() - right).norm() / right.norm()
        # Rounding to eight bits is off by 2^-9 at the most; by a third of 2^-8 on the root mean square.
        assert apart < (2**-9 if where == "on a CPU" else 2**-8)


def test_chunks_follow_from_the_card() -> None:
    """By hand: 80 GiB are 2^28 logits at a time, whatever it reports of them; of 151,936 words 1,766, which are 13
    tiles of 128; a card of 4 GiB, and one that is smaller, has a CPU's chunk."""
    gib = 1 << 30
    rows = [logits.logit_rows(151_936, memory * gib) for memory in (80, 79.1, 141, 24, 16, 15.8, 2)]
    assert [row.chunk for row in rows] == [1664, 1664, 3456, 384, 384, 384, 110]
    assert all(row.kept == 2 * row.chunk for row in rows)
    assert logits.logit_rows(151_936, None) == logits.Rows(110, 1320)
    assert logits.logit_rows(10**9, None).chunk == logits.logit_rows(10**9, gib).chunk == 1


def test_what_exists_at_a_time_is_bounded(chunked: None) -> None:
    """The largest tensor made in forward and backward pass is a chunk's, and no more are kept than was said."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor):
                sizes.append(made.numel())
            return made

    head, hidden, targets = parts(torch.float32)
    with Watch():
        found = token_logprobs(head, hidden, targets, 1.0)
        node: Any = found.grad_fn
        assert len(node.kept) <= logits.KEPT_ELEMENTS // logits.CHUNK_ELEMENTS
        found.sum().backward()
    largest = max(head.weight.numel(), hidden.numel(), 3 * 11)
    assert max(sizes) == largest < 14 * 11


@pytest.mark.parametrize("tokens", [0, 1, 3, 4])
def test_any_number_of_tokens(chunked: None, tokens: int) -> None:
    head, hidden, targets = parts(torch.float32)
    found = token_logprobs(head, hidden[:tokens], targets[:tokens], 1.0)
    assert found.shape == (tokens,)
    found.sum().backward()


def test_entropy_is_that_of_evenly_spaced_tokens() -> None:
    head = torch.nn.Linear(2, 3, bias=False)
    head.weight = torch.nn.Parameter(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    hidden = torch.zeros(6, 2)
    hidden[0] = torch.tensor([2 * torch.log(torch.tensor(2.0)), 0.0])  # at temperature 2: chances 1/2, 1/4, 1/4
    first, even = 1.5 * torch.log(torch.tensor(2.0)), torch.log(torch.tensor(3.0))
    assert torch.allclose(sampled_entropy(head, hidden, 2.0), torch.stack([first + 5 * even, torch.tensor(6.0)]))
    assert torch.allclose(sampled_entropy(head, hidden, 2.0, most=2), torch.stack([first + even, torch.tensor(2.0)]))
    assert sampled_entropy(head, hidden[:0], 2.0).tolist() == [0.0, 0.0]
    assert not sampled_entropy(head, hidden.requires_grad_(), 2.0).requires_grad
