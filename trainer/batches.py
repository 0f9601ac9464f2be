"""Which rows go into which optimizer step, onto which rank, into which forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipeline.recipe import Learning
from trainer.view import Sizes, View


def global_batches(view: View, settings: Learning, seed: int) -> Iterator[list[int]]:
    """Rows of each optimizer step, over all epochs, in order; see `steps_of` for how many there are.

    Epochs follow one another without a gap. What is left at the end and fills no batch is left out, unless there
    is nothing else: an odd small batch would move the policy as far as a full one.
    """
    rest: list[int] = []
    made = 0
    for epoch in range(settings.epochs):
        for index in view.order(seed, epoch).tolist():
            rest.append(index)
            if len(rest) == settings.batch_size:
                yield rest
                made += 1
                rest = []
    if rest and not made:
        yield rest


def steps_of(rows: int, settings: Learning) -> int:
    """Optimizer steps of a round."""
    return max(1, rows * settings.epochs // settings.batch_size)


def split_over_ranks(rows: Sequence[int], sizes: Sizes, ranks: int) -> list[list[int]]:
    """Deals a batch to the ranks so that their token counts are close, rows of a prompt together where that allows it.

    Groups are cut into pieces of at most a quarter of a rank's share; the largest go first, to the least loaded.
    """
    total = sum(sizes.of([row]) for row in rows)
    pieces = _pieces(rows, sizes, total / (4 * ranks) if ranks > 1 else total)
    costs = [sizes.of(piece) for piece in pieces]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for number in sorted(range(len(pieces)), key=lambda number: (-costs[number], pieces[number])):
        rank = min(range(ranks), key=lambda rank: (loads[rank], rank))
        shares[rank] += pieces[number]
        loads[rank] += costs[number]
    return shares


def _pieces(rows: Sequence[int], sizes: Sizes, limit: float) -> list[list[int]]:
    """Rows of one group each, longest first, of at most `limit` tokens unless one row alone is longer."""
    pieces: list[list[int]] = []
    for row in sorted(rows, key=lambda row: (int(sizes.group[row]), -int(sizes.completion[row]), row)):
        last = pieces[-1] if pieces else []
        if last and sizes.group[last[0]] == sizes.group[row] and sizes.of([*last, row]) <= limit:
            last.append(row)
        else:
            pieces.append([row])
    return pieces


def micro_batches(rows: Sequence[int], sizes: Sizes, budget: int) -> list[list[int]]:
    """Cuts rows into forward passes of at most `budget` tokens, padding included; a longer row goes alone.

    Packed, rows of a prompt stay together; padded, rows of like length do, so that next to nothing is padding.
    """
    if sizes.packed:
        order = [row for piece in _pieces(rows, sizes, budget) for row in piece]
    else:
        order = sorted(rows, key=lambda row: (-int(sizes.prompt[row] + sizes.completion[row]), row))
    passes: list[list[int]] = []
    for row in order:
        if passes and sizes.of([*passes[-1], row]) <= budget:
            passes[-1].append(row)
        else:
            passes.append([row])
    return passes
