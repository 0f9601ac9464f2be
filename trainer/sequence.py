"""Sequence parallelism: a team of ranks shares each forward pass, so that a rank keeps its share of the activations.

The packed stream is cut into equal shares. All layers but attention work token by token, on a rank's own share; for
attention an exchange trades positions for heads, so that each rank sees all positions of its share of the heads, and
another trades back (DeepSpeed-Ulysses, arXiv 2309.14509). Kernels and losses do not notice: a kernel gets the whole
stream with fewer heads, and a loss gets all log-probabilities, on each rank of the team.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from pipeline.errors import RequestError
from trainer.packing import Kernel, Layout


@dataclass(frozen=True, slots=True)
class Team:
    """The ranks that share each forward pass, seen from one of them. Ranks of a team are neighbours, on one node."""

    size: int = 1
    place: int = 0
    """This rank's among them."""
    count: int = 1
    """Teams there are."""
    number: int = 0
    """Which of them this is."""
    group: Any = None
    """Null where a team is one rank."""

    @property
    def leads(self) -> bool:
        """Whether this rank speaks for its team where all of its ranks know the same."""
        return self.place == 0


ALONE = Team()


def form(size: int) -> Team:
    """Deals the ranks into teams of `size`. Each rank calls it; raises RequestError where that leaves some over."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if ranks % size:
        raise RequestError(f"learning.sequence_parallel={size} does not divide the {ranks} ranks that were started")
    group = dist.new_subgroups(size)[0] if size > 1 else None  # type: ignore[no-untyped-call]
    return Team(size, rank % size, ranks // size, rank // size, group)


@dataclass(frozen=True, slots=True)
class Share:
    """A rank's part of a packed stream of `tokens`: as many positions on each rank, the last ones may be filled up."""

    team: Team
    tokens: int

    @property
    def length(self) -> int:
        return -(-self.tokens // self.team.size)

    @property
    def first(self) -> int:
        return self.team.place * self.length

    def of(self, stream: Tensor) -> Tensor:
        """[1, tokens] -> [1, length]; zeros where the stream has ended."""
        part = stream[:, self.first : self.first + self.length]
        return F.pad(part, (0, self.length - part.shape[1]))

    def holds(self, places: Tensor) -> Tensor:
        """Which of these places in the stream are this rank's: indices into `places`."""
        return ((places >= self.first) & (places < self.first + self.length)).nonzero().squeeze(-1)


def refuse_uneven_heads(heads: int, team: Team, policy: Any) -> None:
    if heads % team.size:
        raise RequestError(
            f"{policy}: its {heads} attention heads can't be shared by learning.sequence_parallel={team.size} ranks; "
            f"take a divisor of {heads}"
        )


def attend(
    kernel: Kernel, query: Tensor, key: Tensor, value: Tensor, scale: float, layout: Layout, share: Share
) -> Tensor:
    """The kernel on the whole stream and this rank's heads: [length, heads, size] in and out, as `packing.Kernel`.

    Key heads that the ranks don't divide are repeated first; heads of a query stay with their keys.
    """
    ranks = share.team.size
    times = math.lcm(key.shape[1], ranks) // key.shape[1]
    wholes = (query, *(whole.repeat_interleave(times, dim=1) if times > 1 else whole for whole in (key, value)))
    parts = [whole.reshape(share.length, ranks, -1) for whole in wholes]  # [length, ranks, heads / ranks * size]
    # One exchange for the three: as many bytes, a third of the messages.
    received = exchange(torch.cat(parts, dim=2).transpose(0, 1), share.team).flatten(0, 1)[: share.tokens]
    split = torch.split(received, [part.shape[2] for part in parts], dim=1)
    mine = [part.reshape(share.tokens, -1, whole.shape[2]) for part, whole in zip(split, wholes, strict=True)]
    found = kernel(mine[0], mine[1], mine[2], scale, layout)  # [tokens, heads / ranks, size]
    filled = F.pad(found, (0, 0, 0, 0, 0, ranks * share.length - share.tokens))
    back = exchange(filled.reshape(ranks, share.length, *found.shape[1:]), share.team)
    return back.transpose(0, 1).flatten(1, 2)


def exchange(parts: Tensor, team: Team) -> Tensor:
    """Sends `parts[rank]` to each rank of the team and returns what they sent, by rank: [ranks, ...] both."""
    sent: Tensor = _Exchange.apply(parts, team.group)  # type: ignore[no-untyped-call]
    return sent


def joined(own: Tensor, places: Tensor, count: int, team: Team) -> Tensor:
    """What the team's ranks hold at different places [own] -> those of all places, on each rank [count]."""
    alone = own.new_zeros(count).index_copy(0, places, own)
    together: Tensor = _Together.apply(alone, team.group)  # type: ignore[no-untyped-call]
    return together


class _Exchange(torch.autograd.Function):
    """An all-to-all. What a rank got from another has its gradient sent back to it, which is the same exchange."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: Any) -> Tensor:
        ctx.group = group
        received = torch.empty(parts.shape, dtype=parts.dtype, device=parts.device)
        dist.all_to_all_single(received, parts.contiguous(), group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Exchange.apply(gradients[0], ctx.group), None  # type: ignore[no-untyped-call]


class _Together(torch.autograd.Function):
    """A sum over ranks of which all compute the same loss afterwards, so that the gradient is already each one's."""

    @staticmethod
    def forward(ctx: Any, alone: Tensor, group: Any) -> Tensor:
        together = alone.clone()
        dist.all_reduce(together, group=group)
        return together

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
