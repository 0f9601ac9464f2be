"""Which rows a forward pass takes, and which rank makes it: dealt by cost over the whole batch.

Under ZeRO-2 and 3 the ranks meet in each pass, so a step takes as long as the sum, over passes, of each one's slowest
rank. Passes of like cost therefore stand at the same place on all ranks. Under stages 0 and 1 the ranks meet once a
step: there a rank's sum counts, which is evened out as well, at no price, by who gets which pass of a place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from trainer.arithmetic import Arithmetic
from trainer.view import Sizes

GOOD_ENOUGH = 0.985
"""Share of a step in which ranks compute, from which on nothing else is tried."""
A_PASS = 0.01
"""What one more pass costs beside its arithmetic, as a share of a mean one: it gathers and reduces weights."""
CUTS = (math.inf, 0.25, 0.0)
"""Largest pieces of groups that are tried, in costs of a mean pass; the last are single rows."""
FEW = 16
"""Passes a rank up to which they are also filled place by place: with more, filling all alike is as good."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of one batch in the order of their groups, the longest of each first; one number a row, each."""

    number: list[int]
    group: list[int]
    prompt: list[int]
    positions: list[int]
    """Without the prompt."""
    cost: list[float]
    """Without the prompt."""
    prompt_cost: list[float]


@dataclass(slots=True)
class _Piece:
    """Neighbours of one group, the prompt they share among them."""

    first: int
    end: int
    positions: int
    cost: float


def deal(rows: Sequence[int], sizes: Sizes, budget: int, teams: int, arithmetic: Arithmetic) -> list[list[list[int]]]:
    """The forward passes of each team: [team][pass] -> rows. Each has equally many, those that have too few empty ones.

    A pass computes at most `budget` positions, padding included; a longer row goes alone. Rows of a prompt are
    neighbours in their pass, and parted only where ranks then wait less. The same answer for the same arguments.
    """
    if not len(rows):
        return [[] for _ in range(teams)]
    if not sizes.packed:
        return _to_teams(*_padded(rows, sizes, budget, teams, arithmetic), teams)
    batch = _sorted(rows, sizes, arithmetic)
    made = _evenest(batch, budget, teams)
    passes = [[batch.number[row] for row in sorted(_rows_of(pieces))] for pieces in made.pieces]
    return _to_teams(passes, made.cost.tolist(), teams)


@dataclass(frozen=True, slots=True)
class Amount:
    """What forward passes are, counted."""

    computed: int
    """Positions that go through the layers, padding among them."""
    positions: int
    """Without padding; a prompt once for each pass that has rows of it."""
    targets: int
    """Completion tokens."""
    pairs: int
    """Queries with each of their keys, without padding."""


def amount(passes: Sequence[Sequence[int]], sizes: Sizes) -> Amount:
    """Of all these passes together."""
    rows = np.concatenate([np.asarray(part, np.int64) for part in passes])
    prompt, completion = sizes.prompt[rows], sizes.completion[rows]
    if not sizes.packed:
        length = prompt + completion
        computed = sum(sizes.of(part) for part in passes)
        return Amount(computed, int(length.sum()), int(completion.sum()), int((length * (length + 1) // 2).sum()))
    number = np.repeat(np.arange(len(passes)), [len(part) for part in passes])
    _, first = np.unique(number * len(sizes.group) + sizes.group[rows], return_index=True)
    inputs, once = completion - 1, prompt[first]
    positions = int(inputs.sum() + once.sum())
    pairs = int((inputs * prompt + inputs * (inputs + 1) // 2).sum() + (once * (once + 1) // 2).sum())
    return Amount(positions, positions, int(completion.sum()), pairs)


def _to_teams(passes: Sequence[list[int]], costs: Sequence[float], teams: int) -> list[list[list[int]]]:
    """Passes of like cost to one place, the dearest place first; in it, the dearest to whom least was dealt so far."""
    order = sorted((number for number in range(len(passes)) if passes[number]), key=lambda number: -costs[number])
    shares: list[list[list[int]]] = [[] for _ in range(teams)]
    dealt = [0.0] * teams
    for first in range(0, len(order), teams):
        place = order[first : first + teams]
        for number, team in zip(place, sorted(range(teams), key=dealt.__getitem__), strict=False):
            shares[team].append(passes[number])
            dealt[team] += costs[number]
        for share in shares:
            share += [[]] * (first // teams + 1 - len(share))
    return shares


def _padded(
    rows: Sequence[int], sizes: Sizes, budget: int, teams: int, arithmetic: Arithmetic
) -> tuple[list[list[int]], list[float]]:
    """Passes of rows of like length, so that next to nothing is padding, and their costs: a multiple of the teams.

    Rows go in order of length; the bound of a pass's cost is the least with which there are not more passes.
    """
    taken = np.asarray(rows, np.int64)
    lengths = sizes.prompt[taken] + sizes.completion[taken]
    order = np.lexsort((taken, -lengths))
    each = arithmetic.position * lengths + arithmetic.pair * (lengths * (lengths + 1) // 2)
    each, lengths = each[order].astype(float), lengths[order]

    def ends(limit: float) -> list[int]:
        """Where each pass ends. The longest row comes first and says what each costs."""
        found, first = [], 0
        while first < len(taken):
            most = min(budget // int(lengths[first]), int(limit / each[first]) if limit < math.inf else len(taken))
            first = min(len(taken), first + max(1, most))
            found.append(first)
        return found

    wanted = teams * math.ceil(len(ends(math.inf)) / teams)
    low, high = 0.0, float(each[0] * max(1, budget // int(lengths[0]), len(taken)))
    for _ in range(40 if teams > 1 else 0):
        middle = (low + high) / 2
        low, high = (low, middle) if len(ends(middle)) <= wanted else (middle, high)
    found = ends(high if teams > 1 else math.inf)
    starts = [0, *found[:-1]]
    passes = [taken[order[start:end]].tolist() for start, end in zip(starts, found, strict=True)]
    return passes, [each[start] * (end - start) for start, end in zip(starts, found, strict=True)]


def _sorted(rows: Sequence[int], sizes: Sizes, arithmetic: Arithmetic) -> _Rows:
    taken = np.asarray(rows, np.int64)
    order = np.lexsort((taken, -sizes.completion[taken], sizes.group[taken]))
    taken = taken[order]
    prompt, completion = sizes.prompt[taken], sizes.completion[taken]
    inputs = completion - 1
    pairs = inputs * prompt + inputs * (inputs + 1) // 2
    cost = arithmetic.position * inputs + arithmetic.target * completion + arithmetic.pair * pairs
    prompt_cost = arithmetic.position * prompt + arithmetic.pair * (prompt * (prompt + 1) // 2)
    return _Rows(
        taken.tolist(), sizes.group[taken].tolist(), prompt.tolist(), inputs.tolist(), cost.tolist(),
        prompt_cost.tolist(),
    )  # fmt: skip


def _cut(batch: _Rows, budget: int, limit: float) -> list[_Piece]:
    """Groups in pieces of at most `budget` positions and `limit` cost, unless one row alone is more."""
    pieces: list[_Piece] = []
    last: _Piece | None = None
    for row, group in enumerate(batch.group):
        if last is not None and group == batch.group[last.first]:
            positions, cost = last.positions + batch.positions[row], last.cost + batch.cost[row]
            if positions <= budget and cost <= limit:
                last.end, last.positions, last.cost = row + 1, positions, cost
                continue
        positions, cost = batch.prompt[row] + batch.positions[row], batch.prompt_cost[row] + batch.cost[row]
        last = _Piece(row, row + 1, positions, cost)
        pieces.append(last)
    return pieces


@dataclass(slots=True)
class _Passes:
    """Passes that are being filled: one number each."""

    budget: int
    room: np.ndarray
    cost: np.ndarray
    pieces: list[list[_Piece]]

    @classmethod
    def empty(cls, count: int, budget: int) -> _Passes:
        return cls(budget, np.full(count, budget), np.zeros(count), [[] for _ in range(count)])

    def add(self, place: int, piece: _Piece, saved: tuple[int, float] = (0, 0.0)) -> None:
        self.pieces[place].append(piece)
        self.room[place] -= min(piece.positions - saved[0], self.budget)
        self.cost[place] += piece.cost - saved[1]


def _rows_of(pieces: Sequence[_Piece]) -> Iterator[int]:
    for piece in pieces:
        yield from range(piece.first, piece.end)


def _evenest(batch: _Rows, budget: int, teams: int) -> _Passes:
    """Passes, a multiple of the teams, whose places take least time."""
    whole = _cut(batch, budget, math.inf)
    ideal = sum(piece.cost for piece in whole) / teams
    fewest = math.ceil(sum(min(piece.positions, budget) for piece in whole) / (budget * teams))
    best: _Passes | None = None
    least, count, beyond = math.inf, fewest, 0
    while best is None or beyond < 2:
        for made in _ways(batch, whole, ideal / count, count, teams, budget):
            taken = _slowest(made.cost, teams) + A_PASS * ideal * (count / fewest - 1)
            if taken < least:
                best, least = made, taken
            if ideal >= GOOD_ENOUGH * least:
                return made
        beyond += best is not None
        count += 1 if best is not None else max(1, count // FEW)
    return best


def _ways(batch: _Rows, whole: Sequence[_Piece], mean: float, count: int, teams: int, budget: int) -> Iterator[_Passes]:
    """The batch in `count` passes a team, by several cuts of its groups; only those for which that is enough."""
    for cut in CUTS:
        pieces = whole if cut == math.inf else _cut(batch, budget, cut * mean)
        if (made := _evenly(batch, pieces, count, teams, budget)) is not None:
            yield made
    if count <= FEW and (made := _by_place(batch, pieces, count, teams, budget)) is not None:
        yield made


def _evenly(batch: _Rows, pieces: Sequence[_Piece], count: int, teams: int, budget: int) -> _Passes | None:
    """All passes alike: each piece, the dearest first, goes where least was dealt. Null where some find no room."""
    made = _Passes.empty(count * teams, budget)
    order = _descending(pieces)
    left = _fill(batch, made, 0, count * teams, order, math.inf, _once(batch, order) / (count * teams))
    return None if left else made


def _by_place(batch: _Rows, pieces: Sequence[_Piece], count: int, teams: int, budget: int) -> _Passes | None:
    """Place after place: all of one up to the dearest piece left, which one rank makes anyway, or to what is left."""
    made = _Passes.empty(count * teams, budget)
    left = _descending(pieces)
    for place in range(count):
        if left:
            mean = _once(batch, left) / (teams * (count - place))
            level = math.inf if place == count - 1 else max(left[0].cost, mean)
            left = _fill(batch, made, place * teams, (place + 1) * teams, left, level, mean)
    return None if left else made


def _once(batch: _Rows, pieces: Sequence[_Piece]) -> float:
    """What they cost together, each prompt counted once."""
    prompts = {batch.group[piece.first]: batch.prompt_cost[piece.first] for piece in pieces}
    return sum(piece.cost - batch.prompt_cost[piece.first] for piece in pieces) + sum(prompts.values())


def _descending(pieces: Sequence[_Piece]) -> list[_Piece]:
    return sorted(pieces, key=lambda piece: (-piece.cost, piece.first))


def _fill(
    batch: _Rows, made: _Passes, start: int, end: int, pieces: Sequence[_Piece], level: float, mean: float
) -> list[_Piece]:
    """Puts pieces into passes `start` to `end`, up to `level`; returns those left over.

    A piece joins rows of its prompt where that pass is not past the mean by it, the fullest of such; else it goes
    where least was dealt.
    """
    room, cost = made.room[start:end], made.cost[start:end]
    homes: dict[int, list[int]] = {}
    left: list[_Piece] = []
    lowest, widest = 0.0, made.budget
    for piece in pieces:
        need = min(piece.positions, made.budget)
        prompt, prompt_cost = batch.prompt[piece.first], batch.prompt_cost[piece.first]
        mine = homes.setdefault(batch.group[piece.first], [])
        joined = [
            (float(cost[home]) + piece.cost - prompt_cost, home)
            for home in mine
            if room[home] >= piece.positions - prompt
        ]
        after, place = max((choice for choice in joined if choice[0] <= mean), default=(math.inf, -1))
        if place < 0:
            after, place = min(joined, default=(math.inf, -1))
            if widest >= need and lowest + piece.cost <= min(level, after):
                other = int(np.where(room >= need, cost, np.inf).argmin())
                if room[other] >= need and cost[other] + piece.cost < after:
                    after, place = float(cost[other]) + piece.cost, other
        if place < 0 or after > level:
            left.append(piece)
            continue
        shares = place in mine
        made.add(start + place, piece, (prompt, prompt_cost) if shares else (0, 0.0))
        if not shares:
            mine.append(place)
        if level < math.inf:
            lowest, widest = float(cost.min()), int(room.max())
    return left


def _slowest(cost: np.ndarray, teams: int) -> float:
    """Sum over places of the dearest pass, passes of like cost at one place."""
    return float(np.sort(cost)[::-1].reshape(-1, teams)[:, 0].sum())
