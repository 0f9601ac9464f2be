"""Log-probabilities in chunks: exact, differentiable, and bounded in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from trainer import logprobs
from trainer.logprobs import sampled_entropy, token_logprobs

Head = Callable[[torch.nn.Linear], torch.nn.Module]


@pytest.fixture(params=["all kept", "some kept", "none kept"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks of three tokens, of which all, two or none are kept for the backward pass."""
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 3 * 11)
    kept = {"all kept": 100, "some kept": 2, "none kept": 0}[request.param]
    monkeypatch.setattr(logprobs, "KEPT_ELEMENTS", kept * 3 * 11)
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
    """The softmax of 20,000 logits would be off by far in bfloat16's eight bits."""
    head = torch.nn.Linear(16, 20_000, bias=False, dtype=torch.bfloat16)
    hidden = torch.randn(3, 16, dtype=torch.bfloat16)
    found = token_logprobs(head, hidden, torch.tensor([0, 5, 19_999]), 1.0)
    exact = torch.log_softmax(head(hidden).double(), dim=-1)[torch.arange(3), torch.tensor([0, 5, 19_999])]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


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
        assert len(node.kept) <= logprobs.KEPT_ELEMENTS // logprobs.CHUNK_ELEMENTS
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
