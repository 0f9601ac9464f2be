"""From rewards to what the learner regresses on. Nothing here is stored: a sweep over beta1 rewrites no data."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def value(rewards: npt.ArrayLike, beta1: float) -> Array:
    """V(x), the value of the KL-regularised optimum, in the rewards' unit.

    `rewards` [..., G] -> [...]. `beta1 * (logsumexp(r / beta1) - log G)`, shifted by the largest reward, so that
    no beta1 overflows: towards 0 it is max(r), towards infinity mean(r). Source: OAPL (arXiv 2602.19362).
    """
    r = np.asarray(rewards, dtype=np.float64)
    best = r.max(axis=-1)
    # log1p/expm1 keep the digits where beta1 is large and every exponential is next to one.
    v: Array = best + beta1 * np.log1p(np.expm1((r - best[..., None]) / beta1).mean(axis=-1))
    return v


def advantages(rewards: npt.ArrayLike, beta1: float) -> Array:
    """`r - V(x)` of one group: [G] -> [G]. All zero where all rewards are equal."""
    r = np.asarray(rewards, dtype=np.float64)
    return r - value(r, beta1)[..., None]


def standardised(rewards: npt.ArrayLike) -> Array:
    """GRPO's advantage of one group: `(r - mean) / (std + 1e-6)`, [G] -> [G]. Source: arXiv 2402.03300.

    The deviation is the population's, as the paper writes it; some trainers divide by G - 1 instead.
    """
    r = np.asarray(rewards, dtype=np.float64)
    scaled: Array = (r - r.mean()) / (r.std() + 1e-6)
    return scaled


def is_uniform(rewards: npt.ArrayLike) -> bool:
    """Whether the group has no variance, and so nothing to learn from but the pull back to the behaviour policy."""
    r = np.asarray(rewards, dtype=np.float64)
    return bool((r == r[..., :1]).all())
