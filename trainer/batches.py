"""Which rows go into which optimizer step."""

from __future__ import annotations

from collections.abc import Iterator

from pipeline.recipe import Learning
from trainer.view import View


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
