"""How many logits the learner makes at a time and keeps: for the learner, and the plan that foretells its memory."""

from __future__ import annotations

from dataclasses import dataclass

CHUNK_ELEMENTS = 1 << 24
"""On a CPU, and on a card of up to 4 GiB: logits that are made at a time, 64 MiB in float32."""
KEPT_ELEMENTS = 3 << 26
"""On a CPU: logits that are kept for the backward pass, 768 MiB in float32; those beyond are computed twice instead."""
CARD_SHARE = 60
"""A chunk takes at most this part of a card, its float32 bytes a power of two. A sixtieth and not a sixty-fourth, since
a card of 16 GiB reports a little less, and is to get what is planned for 16."""
CARD_KEPT = 2
"""Chunks that are kept on a card. With two more at work, logits take at most a fifteenth of it."""
TILE = 128
"""Rows of a chunk on a card are a multiple of this, as matrix products have it."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokens whose logits exist together."""

    chunk: int
    """Made at a time."""
    kept: int
    """Kept from the forward for the backward pass, whole chunks."""


def logit_rows(vocabulary: int, memory: float | None) -> Rows:
    """Of a head with so many words, on a card of `memory` bytes, or on a CPU (null).

    By what a card has, not by what is free: the same card cuts the same chunks in every run, and sums alike.
    """
    if memory is None:
        chunk = max(1, CHUNK_ELEMENTS // vocabulary)
        return Rows(chunk, chunk * (KEPT_ELEMENTS // CHUNK_ELEMENTS))
    most = int(memory) // (4 * CARD_SHARE)
    elements = max(CHUNK_ELEMENTS, 1 << max(0, most.bit_length() - 1))
    chunk = max(1, elements // vocabulary)
    if chunk > TILE:
        chunk -= chunk % TILE
    return Rows(chunk, CARD_KEPT * chunk)
