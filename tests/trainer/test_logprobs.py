"""Log-probabilities in chunks: exact, differentiable, and bounded in memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from trainer import logprobs
from trainer.logprobs import Pick, token_logprobs


@pytest.fixture(params=["all kept", "some kept", "none kept"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chunks of three tokens, of which all, two or none are kept for the backward pass."""
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 3 * 11)
    kept = {"all kept": 100, "some kept": 2, "none kept": 0}[request.param]
    monkeypatch.setattr(logprobs, "KEPT_ELEMENTS", kept * 3 * 11)
    yield


def parts(dtype: torch.dtype) -> tuple[torch.nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = torch.nn.Linear(5, 11, bias=False, dtype=dtype)
    hidden = torch.randn(14, 5, dtype=dtype, requires_grad=True)
    return head, hidden, torch.randint(0, 11, (14,))


def test_gradcheck(chunked: None) -> None:
    head, hidden, targets = parts(torch.float64)

    def through(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(Whole(head, targets), {"head.weight": weight}, (values,))

    assert torch.autograd.gradcheck(through, (hidden, head.weight.detach().requires_grad_()))


class Whole(torch.nn.Module):
    def __init__(self, head: torch.nn.Linear, targets: torch.Tensor) -> None:
        super().__init__()
        self.head, self.targets = head, targets

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return token_logprobs(self.head, hidden, self.targets, 0.6)


def test_pick_alone() -> None:
    logits = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, 9, (6,))
    assert torch.autograd.gradcheck(lambda values: Pick.apply(values, targets, 1.7), (logits,))


def test_it_equals_all_logits_at_once(chunked: None) -> None:
    head, hidden, targets = parts(torch.float32)
    weights = torch.randn(14)
    found = token_logprobs(head, hidden, targets, 0.6)
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


def test_what_exists_at_a_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that autograd holds for the backward pass: the kept logits and the inputs, whatever the token count."""
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 4 * 1000)
    monkeypatch.setattr(logprobs, "KEPT_ELEMENTS", 8 * 1000)

    def held(tokens: int) -> int:
        found: dict[int, int] = {}

        def pack(value: torch.Tensor) -> torch.Tensor:
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        head = torch.nn.Linear(2, 1000, bias=False)
        hidden = torch.randn(tokens, 2, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            token_logprobs(head, hidden, torch.zeros(tokens, dtype=torch.long), 1.0)
        return sum(found.values())

    kept = 8 * 1000 * 4
    assert held(8) < kept + 30_000
    assert held(800) < kept + 30_000 + 800 * 60


@pytest.mark.parametrize("tokens", [0, 1, 3, 4])
def test_any_number_of_tokens(chunked: None, tokens: int) -> None:
    head, hidden, targets = parts(torch.float32)
    found = token_logprobs(head, hidden[:tokens], targets[:tokens], 1.0)
    assert found.shape == (tokens,)
    found.sum().backward()
