"""How much of a step ranks compute and do not wait: `python -m benchmarks.learner.dealing`.

Batches of groups of eight, lengths log-normal within and between groups and cut off at the longest; arithmetic of
Qwen3-4B. Efficiency is the ideal (all arithmetic, each prompt once, over the ranks) over the sum, over passes, of the
slowest rank: what ZeRO-2 and 3 wait for. `before`: the batch dealt to the ranks by tokens, each share then cut in
order. `stage 0, 1`: the same passes where ranks wait for one another once a step. Milliseconds are of one dealing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np

from pipeline.policies.shapes import KNOWN
from trainer.arithmetic import Arithmetic
from trainer.dealing import amount, deal
from trainer.view import Sizes

GROUP = 8
SHAPE = KNOWN["Qwen/Qwen3-4B-Thinking-2507"]
ARITHMETIC = Arithmetic(
    position=6 * SHAPE.layers * (2 * SHAPE.hidden * (SHAPE.query + SHAPE.key) + 3 * SHAPE.hidden * SHAPE.mlp),
    target=6 * SHAPE.embedding,
    pair=12 * SHAPE.layers * SHAPE.query,
)
Plan = list[list[list[int]]]


def batch_of(rows: int, longest: int, seed: int) -> Sizes:
    rng = np.random.default_rng(seed)
    groups = rows // GROUP
    level = np.repeat(rng.lognormal(np.log(longest / 3), 0.5, groups), GROUP)
    completion = np.clip(level * rng.lognormal(0, 0.6, rows), 16, longest).astype(np.int64)
    prompt = np.clip(rng.lognormal(np.log(150), 0.6, groups), 30, 2048).astype(np.int64)
    return Sizes(np.repeat(prompt, GROUP), completion, np.repeat(np.arange(groups), GROUP), True)


def before(rows: Sequence[int], sizes: Sizes, budget: int, ranks: int) -> Plan:
    """As it was: to ranks by tokens, pieces of at most a quarter of a share; then cut greedily, in order."""
    total = sum(sizes.of([row]) for row in rows)
    pieces = _pieces(rows, sizes, total / (4 * ranks) if ranks > 1 else total)
    costs = [sizes.of(piece) for piece in pieces]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for number in sorted(range(len(pieces)), key=lambda number: (-costs[number], pieces[number])):
        rank = min(range(ranks), key=lambda rank: (loads[rank], rank))
        shares[rank] += pieces[number]
        loads[rank] += costs[number]
    plans = []
    for share in shares:
        passes: list[list[int]] = []
        for row in (row for piece in _pieces(share, sizes, budget) for row in piece):
            if passes and sizes.of([*passes[-1], row]) <= budget:
                passes[-1].append(row)
            else:
                passes.append([row])
        plans.append(passes)
    longest = max(len(passes) for passes in plans)
    return [passes + [[]] * (longest - len(passes)) for passes in plans]


def _pieces(rows: Sequence[int], sizes: Sizes, limit: float) -> list[list[int]]:
    pieces: list[list[int]] = []
    for row in sorted(rows, key=lambda row: (int(sizes.group[row]), -int(sizes.completion[row]), row)):
        last = pieces[-1] if pieces else []
        if last and sizes.group[last[0]] == sizes.group[row] and sizes.of([*last, row]) <= limit:
            last.append(row)
        else:
            pieces.append([row])
    return pieces


def cost(rows: Sequence[int], sizes: Sizes) -> float:
    counted = amount([rows], sizes)
    return ARITHMETIC.of(counted.positions, counted.targets, counted.pairs)


def efficiency(plan: Plan, sizes: Sizes, rows: int) -> tuple[float, float]:
    """Where ranks meet in each pass, and where they meet once a step."""
    costs = np.array([[cost(part, sizes) if part else 0.0 for part in share] for share in plan])
    ideal = cost(range(rows), sizes) / len(plan)
    return ideal / costs.max(axis=0).sum(), ideal / costs.sum(axis=1).max()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--rows", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--new-only", action="store_true", help="Without the one before, which takes seconds a batch.")
    arguments = parser.parse_args()
    ways: dict[str, Callable[..., Plan]] = {} if arguments.new_only else {"before": before}
    ways["now"] = lambda rows, sizes, budget, ranks: deal(rows, sizes, budget, ranks, ARITHMETIC)
    print(
        "| budget | rows | ranks | dealt | efficiency | stage 0, 1 | passes | ms |\n|---|---|---|---|---|---|---|---|"
    )
    for budget, longest in ((18_432, 16_384), (36_864, 32_768)):
        for rows in arguments.rows:
            for ranks in arguments.ranks:
                for name, way in ways.items():
                    found = []
                    for seed in range(arguments.seeds):
                        sizes = batch_of(rows, longest, seed)
                        started = time.perf_counter()
                        plan = way(range(rows), sizes, budget, ranks)
                        taken = time.perf_counter() - started
                        found.append((*efficiency(plan, sizes, rows), len(plan[0]), 1e3 * taken))
                    each, once, passes, milliseconds = (statistics.mean(column) for column in zip(*found, strict=True))
                    numbers = f"{each:.3f} | {once:.3f} | {passes:.1f} | {milliseconds:.0f}"
                    print(f"| {budget:,} | {rows:,} | {ranks} | {name} | {numbers} |", flush=True)


if __name__ == "__main__":
    main()
