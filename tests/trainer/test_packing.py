"""Packed passes against the sequences one by one, in loss and gradients, for each kernel that runs here."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attention_parts import put_in_place
from learning_parts import plain_logprobs

from trainer.attention import register
from trainer.engine import ALONE, Scored
from trainer.losses import LOSSES, Batch, Settings
from trainer.passes import collate
from trainer.policy import load_policy
from trainer.sequence import Team
from trainer.view import Example

TEMPERATURE = 0.7


def some_examples(seed: int, longest: int) -> tuple[list[Example], list[int]]:
    """Groups of one to four completions; one of a single token, one much longer than the others."""
    rng = random.Random(seed)
    examples, groups = [], []
    for group, size in enumerate((3, 1, 4)):
        prompt = np.array([rng.randrange(3, 250) for _ in range(rng.randrange(1, 20))], np.int32)
        for member in range(size):
            length = {0: 1, 1: longest}.get(member, rng.randrange(1, 15))
            completion = np.array([rng.randrange(3, 250) for _ in range(length)], np.int32)
            mu = np.array([rng.uniform(-6, -4) for _ in range(length)], np.float32)
            examples.append(Example(prompt, completion, mu, mu, rng.uniform(-1, 1), 1.0))
            groups.append(group)
    return examples, groups


def loss_and_gradients(model: Any, scored: torch.Tensor, examples: list[Example], name: str) -> tuple[Any, Any]:
    """Of [sequences, tokens] log-probabilities: each sequence's loss, and each weight's gradient of their sum."""
    taken = collate(examples, [0] * len(examples), 0, None)
    batch = Batch(scored, taken.behaviour, taken.mask, taken.advantage, taken.reward, taken.sampled)
    losses, _ = LOSSES[name](batch, Settings(beta2=0.1))
    model.zero_grad()
    losses.sum().backward()
    return {"loss": losses.detach().double()}, {
        key: value.grad.double().clone() for key, value in model.named_parameters()
    }


def our_logprobs(
    model: Any, examples: list[Example], groups: list[int], attention: str | None, team: Team = ALONE
) -> torch.Tensor:
    taken = collate(examples, groups, 0, attention, team)
    told = taken.ids, taken.positions, taken.layout, taken.sources, taken.targets, taken.own
    chosen = Scored(model, TEMPERATURE, team)(*told)
    return torch.zeros(taken.mask.shape).masked_scatter(taken.mask, chosen)


def exact_logprobs(model: Any, examples: list[Example]) -> torch.Tensor:
    """One by one, full logits, float64."""
    rows = [
        plain_logprobs(model, e.prompt_tokens.tolist(), e.completion_tokens.tolist(), TEMPERATURE) for e in examples
    ]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def relative(found: Any, exact: Any) -> float:
    """Of all values as one vector."""
    apart = sum((found[key] - exact[key]).square().sum() for key in exact)
    return float((apart / sum(value.square().sum() for value in exact.values())).sqrt())


@pytest.mark.parametrize("loss", ["oapl", "grpo"])
@pytest.mark.parametrize("longest", [12, 150], ids=["alike", "long-tailed"])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "varlen", "flash", None])
def test_packed_equals_one_by_one(
    policy: Path, float64: Any, attention: str | None, longest: int, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1e-6 relative in float32, loss and gradients, against float64: no boundary leaks, no token is lost."""
    put_in_place(monkeypatch)
    examples, groups = some_examples(longest, longest)
    name = register(attention) if attention else "sdpa"
    model = load_policy(policy, torch.float32, name).train()
    found_loss, found = loss_and_gradients(model, our_logprobs(model, examples, groups, attention), examples, loss)
    exact_loss, exact = loss_and_gradients(float64, exact_logprobs(float64, examples), examples, loss)
    float64.zero_grad()
    assert relative(found_loss, exact_loss) < 1e-6
    assert relative(found, exact) < 1e-6


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_what_stands_elsewhere_changes_nothing(policy: Path, attention: str) -> None:
    """Other prompts and completions in the same pass: not a bit of a sequence's log-probabilities moves much."""
    examples, groups = some_examples(3, 30)
    model = load_policy(policy, torch.float32, register(attention))
    with torch.no_grad():
        together = our_logprobs(model, examples, groups, attention)
        for number, example in enumerate(examples):
            alone = our_logprobs(model, [example], [0], attention)[0]
            torch.testing.assert_close(together[number, : len(alone)], alone, rtol=0, atol=3e-6)
