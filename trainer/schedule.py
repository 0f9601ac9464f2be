"""The learning rate as a function of steps done; nothing of it is stored, so resuming can't get it wrong."""

from __future__ import annotations

import math

from pipeline.recipe import Learning


def learning_rate(settings: Learning, round: int, done: int, planned: int, before: int) -> float:
    """Rate of the optimizer step after `done` of a round's `planned` ones; `before` were done in all rounds before.

    linear and cosine fall from `learning_rate` to `final_learning_rate` of it over `horizon_rounds` rounds, or anew
    in each round where that is 0, and stay there. Warm-up counts steps since the start, over rounds, and multiplies.
    """
    horizon = settings.horizon_rounds or 1
    gone = done / planned + (round if settings.horizon_rounds else 0)
    left = max(0.0, 1.0 - gone / horizon)
    floor = settings.final_learning_rate
    factor = {
        "constant": 1.0,
        "linear": floor + (1 - floor) * left,
        "cosine": floor + (1 - floor) * 0.5 * (1 - math.cos(math.pi * left)),
    }[settings.schedule]
    warm = min(1.0, (before + done + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    return settings.learning_rate * factor * warm
