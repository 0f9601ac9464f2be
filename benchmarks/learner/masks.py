"""The flex kernel's mask: time and peak memory of making it, from the dense rule and from the segments.

    python benchmarks/learner/masks.py [--tokens 4096 18432 36864] [--completions 8]

Each in a process of its own; peak resident memory above what the process had before, the quicker of two. `before` is
create_block_mask, which evaluates the rule for every pair of tokens, as the kernel did in every layer; `now` is laid
out on the host and built once a pass.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import torch

from trainer import blocks
from trainer.packing import lay_out


def segments_of(tokens: int, completions: int) -> list[tuple[int, int]]:
    """Groups of so many completions of some 2,000 tokens, as far as they go, behind prompts of 200."""
    segments: list[tuple[int, int]] = []
    left = tokens
    while left > 0:
        prompt = len(segments)
        segments.append((min(200, left), -1))
        left -= segments[-1][0]
        for number in range(completions):
            if left > 0:
                segments.append((min(1500 + 150 * number, left), prompt))
                left -= segments[-1][0]
    return segments


def one(way: str, tokens: int, completions: int) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    blocks.mask_of(lay_out([(8, -1)], "flex"))  # what is made once a process
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    segments = segments_of(tokens, completions)
    started = time.perf_counter()
    layout = lay_out(segments, "flex")
    made = blocks.mask_of(layout)
    took = time.perf_counter() - started
    if way == "before":
        started = time.perf_counter()
        made = create_block_mask(made.mask_mod, None, None, tokens, tokens, device="cpu")
        took = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - held
    seen = int(made.kv_num_blocks.sum() + made.full_kv_num_blocks.sum())
    print(took, peak / 1024, seen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 18_432, 36_864])
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--way", choices=["before", "now"])
    told = parser.parse_args()
    if told.way:
        torch.set_num_threads(1)
        one(told.way, told.tokens[0], told.completions)
        return
    print("| tokens | blocks seen | before: ms, MiB | now: ms, MiB | before / now, time |\n|---|---|---|---|---|")
    for tokens in told.tokens:
        found = {}
        for way in ("before", "now"):
            words = [
                sys.executable,
                __file__,
                "--way",
                way,
                "--tokens",
                str(tokens),
                "--completions",
                str(told.completions),
            ]
            tries = [
                [
                    float(word)
                    for word in subprocess.run(words, capture_output=True, check=True, text=True).stdout.split()
                ]
                for _ in range(2)
            ]
            found[way] = min(tries)
        assert found["before"][2] == found["now"][2]
        shown = [f"{1000 * found[way][0]:.1f}, {found[way][1]:.0f}" for way in ("before", "now")]
        ratio = found["before"][0] / found["now"][0]
        print(f"| {tokens:,} | {found['now'][2]:.0f} | {shown[0]} | {shown[1]} | {ratio:.0f} |")


if __name__ == "__main__":
    main()
