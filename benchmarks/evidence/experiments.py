"""The comparisons of docs/evidence.md, as the words of `oapl compare`; each goes on where it was stopped."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, product
from pathlib import Path

COMPARED = "data/compare"
SEEDS = "0,1,2"
ALIKE = ("--recipe", "tiny", "--set", "learning.batch_size=32", "--set", "generation.samples=16")
"""Shared by all: a round of lag L samples 2 L prompts, 16 times each."""

Words = list[str]

# Chosen by the first six settings of `tune` (seed 11), for lags up to 64 and from 400 on.
SHORT = {
    "oapl": ["learning_rate=3e-4", "beta2=0.2"],
    "grpo": ["learning_rate=3e-4", "clip_low=0.5", "clip_high=2.0"],
}
LONG = {
    "oapl": ["learning_rate=1e-4", "beta2=0.07"],
    "grpo": ["learning_rate=1e-4", "clip_low=0.5", "clip_high=2.0"],
}
PAPER = ["clip_low=0.8", "clip_high=1.28"]
"""GRPO's clip bounds in the paper's baseline."""
WIDER = ["clip_low=0.2", "clip_high=5.0"]
"""GRPO's bounds in the best of all ten settings, at the rates of the best of six."""


def arm(name: str, loss: str, *settings: str) -> Words:
    """One more thing to compare."""
    return ["--variant", f"{name}:" + ",".join(f"learning.{setting}" for setting in (f"loss={loss}", *settings))]


def both(chosen: dict[str, list[str]], suffix: str = "", *more: str) -> Words:
    return [word for loss, told in chosen.items() for word in arm(loss + suffix, loss, *told, *more)]


def fresh(out: str, lag: int, *words: str, seeds: str = SEEDS) -> Words:
    return [*ALIKE, "--lag", str(lag), "--seeds", seeds, "--out", f"{COMPARED}/{out}", *words]


def stored(out: str, run: str, *words: str, of: str = "lags", seeds: str = SEEDS) -> Words:
    """A seed is an order of learning here: the completions are the same."""
    return ["--rollouts", f"{COMPARED}/{of}/runs/{run}", "--seeds", seeds, "--out", f"{COMPARED}/{out}", *words]


def quick() -> Iterator[Words]:
    """Two losses, two seeds, one lag: a quarter of an hour at most."""
    yield fresh("quick", 64, *both(SHORT), seeds="0,1")


def tune() -> Iterator[Words]:
    """How rates, beta2 and clip bounds were chosen: one round on another seed, ten settings for each loss.

    Six of each first; then four more beyond the edges that the best of those lay at.
    """
    words = ["--set", "evaluation.samples=4", "--set", "evaluation.ks=[1,4]"]
    for rate, beta2 in product(("1e-4", "3e-4"), ("0.02", "0.07", "0.2")):
        words += arm(f"oapl-{rate}-b{beta2}", "oapl", f"learning_rate={rate}", f"beta2={beta2}")
    for rate in ("1e-4", "3e-4", "3e-5"):
        words += arm(f"grpo-{rate}", "grpo", f"learning_rate={rate}")
    for rate in ("1e-4", "3e-4"):
        words += arm(f"grpo-{rate}-wide", "grpo", f"learning_rate={rate}", "clip_low=0.5", "clip_high=2.0")
    words += arm("grpo-1e-4-narrow", "grpo", "learning_rate=1e-4", "clip_low=0.9", "clip_high=1.1")
    for rate, beta2 in (("3e-5", "0.07"), ("3e-4", "0.6"), ("1e-3", "0.2"), ("1e-3", "0.6")):
        words += arm(f"oapl-{rate}-b{beta2}", "oapl", f"learning_rate={rate}", f"beta2={beta2}")
    for rate, low, high in (
        ("3e-5", "0.5", "2.0"),
        ("1e-3", "0.5", "2.0"),
        ("1e-4", "0.2", "5.0"),
        ("3e-4", "0.2", "5.0"),
    ):
        name = f"grpo-{rate}-{'wide' if low == '0.5' else 'wider'}"
        words += arm(name, "grpo", f"learning_rate={rate}", f"clip_low={low}", f"clip_high={high}")
    for lag in (64, 400):
        yield fresh("tune", lag, *words, seeds="11")


def lags() -> Iterator[Words]:
    """GRPO at the best of six settings, as grpo-wider at the best of ten, with the paper's clip bounds at their best
    rate, and with truncated weights.

    At 1000 samples are learned from twice, as there are no more prompts.
    """
    wider_short = arm("grpo-wider", "grpo", "learning_rate=3e-4", *WIDER)
    wider_long = arm("grpo-wider", "grpo", "learning_rate=1e-4", *WIDER)
    truncated = arm("grpo-truncated", "grpo", *LONG["grpo"], "behaviour=recomputed", "importance_cap=2.0")
    paper_short = arm("grpo-paper", "grpo", "learning_rate=3e-4", *PAPER)
    paper_long = arm("grpo-paper", "grpo", "learning_rate=1e-4", *PAPER)
    yield fresh("lags", 64, *both(SHORT), *paper_short, *wider_short)
    yield fresh("lags", 400, *both(LONG), *paper_long, *truncated, *wider_long)
    yield fresh("lags", 1000, *both(LONG), *wider_long, "--set", "learning.epochs=2")


def short_lag() -> Iterator[Words]:
    """Rounds of eight and of four steps: the paper's baseline is GRPO on samples as fresh as these."""
    yield fresh("short_lag", 8, *both(SHORT), "--steps", "64")
    yield fresh("short_lag", 4, *arm("grpo", "grpo", *SHORT["grpo"]), "--steps", "64")


def generations() -> Iterator[Words]:
    """Four epochs over each batch of 512, to lay beside the fresh samples of lag 8."""
    four = arm("oapl-4-epochs", "oapl", *SHORT["oapl"])
    yield fresh("short_lag", 64, *four, "--steps", "256", "--set", "learning.epochs=4")


def betas() -> Iterator[Words]:
    pairs = [("1", "0.02"), ("1", "0.07"), ("1", "0.2"), ("1", "0.6"), ("0.3", "0.2"), ("3", "0.2")]
    words = [
        word
        for beta1, beta2 in pairs
        for word in arm(
            f"beta1-{beta1}-beta2-{beta2}", "oapl", "learning_rate=3e-4", f"beta1={beta1}", f"beta2={beta2}"
        )
    ]
    yield stored("betas", "start-lag64-seed0", *words)


def groups() -> Iterator[Words]:
    """Groups without variance kept, as everywhere here, and dropped."""
    dropped = both(SHORT, "-dropped", "drop_uniform_groups=true")
    yield stored("groups", "start-lag64-seed0", *both(SHORT), *dropped)


def epochs() -> Iterator[Words]:
    words = [word for count in (1, 4) for word in both(SHORT, f"-{count}", f"epochs={count}")]
    yield stored("epochs", "start-lag64-seed0", *words)


def replay() -> Iterator[Words]:
    """The eighth round of lag 8, alone and with the rounds before it."""
    words = [word for rounds in (0, 4) for word in both(SHORT, f"-{rounds}", f"replay_rounds={rounds}")]
    yield stored("replay", "oapl-lag8-seed0", "--round", "7", *words, of="short_lag")


def behaviour() -> Iterator[Words]:
    """What stands for the behaviour policy, where the engine samples in float32 and in bfloat16."""
    recomputed = both(SHORT, "-recomputed", "behaviour=recomputed")
    for dtype in ("float32", "bfloat16"):
        told = ("--set", f"generation.dtype={dtype}")
        yield fresh(f"behaviour-{dtype}", 64, *both(SHORT), *recomputed, *told)


def smollm2() -> Iterator[Words]:
    """A pretrained model, one seed, at the recipe's rate and beta2; neither loss was tuned on it."""
    words = ["--recipe", "smollm2", *arm("oapl", "oapl"), *arm("grpo", "grpo", "clip_low=0.5", "clip_high=2.0")]
    many = ["--set", "evaluation.samples=32", "--set", "evaluation.ks=[1,2,4,8,16,32]"]
    yield [*words, "--lag", "32", *many, "--out", f"{COMPARED}/smollm2"]
    few = ["--set", "evaluation.samples=4", "--set", "evaluation.ks=[1,4]"]
    yield [*words, "--lag", "8", "--steps", "32", *few, "--out", f"{COMPARED}/smollm2_short"]


def smollm2_settings() -> Iterator[Words]:
    """Why the two differ on SmolLM2: the same stored round under other settings of each.

    Judged on the same held-out prompts, so they explain, and are no fair choice.
    """
    words = [
        *arm("oapl-3e-5", "oapl", "learning_rate=3e-5"),
        *arm("grpo-3e-6", "grpo", "learning_rate=3e-6", "clip_low=0.5", "clip_high=2.0"),
        *arm("oapl-b0.03", "oapl", "beta2=0.03"),
    ]
    few = ["--set", "evaluation.samples=8", "--set", "evaluation.ks=[1,4,8]"]
    yield stored("smollm2_settings", "start-lag32-seed0", *words, *few, of="smollm2", seeds="0")


EXPERIMENTS = {
    made.__name__: made
    for made in (
        quick,
        tune,
        lags,
        short_lag,
        generations,
        betas,
        groups,
        epochs,
        replay,
        behaviour,
        smollm2,
        smollm2_settings,
    )
}
ALL = ("lags", "short_lag", "behaviour", "generations", "smollm2", "replay", "betas", "groups", "epochs")
"""What `make evidence` runs; `quick`, and what settings were tried, are on their own."""


def written(words: Words) -> Path:
    """The comparison's folder that a call fills."""
    return Path(dict(pairwise(words))["--out"])


def read(words: Words) -> Path | None:
    """The comparison's folder whose rollouts a call learns from."""
    rollouts = dict(pairwise(words)).get("--rollouts")
    return None if rollouts is None else Path(rollouts).parents[1]


def hinders(earlier: Words, words: Words) -> bool:
    """Whether a call must wait until an earlier one has ended: one of them fills a folder that the other one uses."""
    return written(earlier) in (written(words), read(words)) or written(words) == read(earlier)
