"""A forward pass: examples laid out as the tensors that the policy and the loss take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from trainer.packing import Layout, lay_out
from trainer.sequence import ALONE, Share, Team
from trainer.transfer import Packed
from trainer.view import Example, Integers


@dataclass(frozen=True, slots=True)
class Pass:
    """A forward pass and what the loss needs of it."""

    ids: torch.Tensor  # [1, tokens] packed, [sequences, tokens] padded on the right
    positions: torch.Tensor | None  # like ids; null where they simply count
    layout: Layout | None  # who attends to whom; null where each row of ids is a sequence
    sources: torch.Tensor  # [completion tokens], places in ids (flattened) whose output predicts them
    targets: torch.Tensor  # [completion tokens]
    behaviour: torch.Tensor  # [sequences, longest completion]
    sampled: torch.Tensor  # [sequences, longest completion]
    mask: torch.Tensor  # [sequences, longest completion]
    cells: torch.Tensor  # [completion tokens], places of them in mask (flattened)
    advantage: torch.Tensor  # [sequences]
    reward: torch.Tensor  # [sequences]
    own: torch.Tensor | None = None  # [own tokens], which of sources this rank of a team computes; null: all

    def to(self, device: torch.device) -> Pass:
        return self if device.type == "cpu" else Packed(self, pin=device.type == "cuda").on(device)


def collate(
    examples: Sequence[Example], groups: Sequence[int], pad: int, attention: str | None, team: Team = ALONE
) -> Pass:
    """Lays examples out for one forward pass, on the host; `groups` are neighbours that share a prompt.

    With `attention` (a key of `trainer.attention.KERNELS`) they are packed: a prompt once, then its completions
    without their last token, whose output nobody needs. Without it they are padded on the right, where causal
    attention hides it. What a card would have to be asked for is worked out here: lengths and places.
    """
    widest = max(len(e.completion_tokens) for e in examples)
    behaviour, sampled = (np.zeros((len(examples), widest), np.float32) for _ in range(2))
    mask = np.zeros((len(examples), widest), bool)
    for number, example in enumerate(examples):
        length = len(example.completion_tokens)
        behaviour[number, :length] = example.behaviour
        sampled[number, :length] = example.sampled
        mask[number, :length] = True
    ids, positions, layout, sources = _packed(examples, groups, attention) if attention else _padded(examples, pad)
    return Pass(
        torch.from_numpy(ids),
        positions if positions is None else torch.from_numpy(positions),
        layout,
        torch.from_numpy(sources),
        torch.from_numpy(np.concatenate([e.completion_tokens for e in examples]).astype(np.int64)),
        torch.from_numpy(behaviour),
        torch.from_numpy(sampled),
        torch.from_numpy(mask),
        torch.from_numpy(np.flatnonzero(mask)),
        torch.tensor([e.advantage for e in examples], dtype=torch.float32),
        torch.tensor([e.reward for e in examples], dtype=torch.float32),
        Share(team, ids.shape[1]).holds(torch.from_numpy(sources)) if team.size > 1 else None,
    )


_ONE = np.zeros(1, np.int32)
FILLER = Example(_ONE, _ONE, np.zeros(1, np.float32), np.zeros(1, np.float32), 0.0, 0.0)
"""What a rank computes where it has no rows left and others do: a pass of one token."""


def shortened(example: Example, longest: int) -> Example:
    """The end of its prompt and the beginning of its completion, at most so many tokens of each."""
    return replace(
        example,
        prompt_tokens=example.prompt_tokens[-longest:],
        completion_tokens=example.completion_tokens[:longest],
        behaviour=example.behaviour[:longest],
        sampled=example.sampled[:longest],
    )


Placed = tuple[Integers, Integers | None, Layout | None, Integers]


def _padded(examples: Sequence[Example], pad: int) -> Placed:
    longest = max(len(e.prompt_tokens) + len(e.completion_tokens) for e in examples)
    ids = np.full((len(examples), longest), pad, np.int64)
    sources = []
    for number, example in enumerate(examples):
        prompt, completion = len(example.prompt_tokens), len(example.completion_tokens)
        ids[number, :prompt] = example.prompt_tokens
        ids[number, prompt : prompt + completion] = example.completion_tokens
        first = number * longest + prompt - 1
        sources.append(np.arange(first, first + completion))
    return ids, None, None, np.concatenate(sources)


def _packed(examples: Sequence[Example], groups: Sequence[int], attention: str) -> Placed:
    ids, positions, sources = [], [], []
    segments: list[tuple[int, int]] = []  # (tokens, which segment is its prefix, or -1)
    end = prompt_segment = prompt_end = 0
    for number, example in enumerate(examples):
        prompt, inputs = example.prompt_tokens, example.completion_tokens[:-1]
        if number == 0 or groups[number] != groups[number - 1]:
            prompt_segment = len(segments)
            segments.append((len(prompt), -1))
            ids.append(prompt)
            positions.append(np.arange(len(prompt)))
            end = prompt_end = end + len(prompt)
        sources.append(np.concatenate([[prompt_end - 1], np.arange(end, end + len(inputs))]))
        if len(inputs):
            segments.append((len(inputs), prompt_segment))
            ids.append(inputs)
            positions.append(np.arange(len(prompt), len(prompt) + len(inputs)))
            end += len(inputs)
    layout = lay_out(segments, attention)
    joined = np.concatenate(ids).astype(np.int64), np.concatenate(positions).astype(np.int64)
    return joined[0][None], joined[1][None], layout, np.concatenate(sources).astype(np.int64)
