"""Passes are dealt so that no row is lost, no pass too large, and ranks that meet in each of them hardly wait."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.arithmetic import Arithmetic
from trainer.dealing import Amount, amount, deal
from trainer.view import Sizes

LINEAR = Arithmetic(position=1.0, target=0.2, pair=0.0)
LONG = Arithmetic(position=1.0, target=0.2, pair=0.02)
"""Attention to a hundred keys costs twice what a position does in the layers."""


def sizes_of(seed: int, packed: bool = True, groups: int = 40, members: int = 8) -> Sizes:
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(4, 0.7, groups * members), 1, 400).astype(np.int64)
    prompts = np.repeat(rng.integers(5, 40, groups), members)
    return Sizes(prompts, lengths, np.repeat(np.arange(groups), members), packed)


def counted(rows: list[int], sizes: Sizes, arithmetic: Arithmetic) -> float:
    """By the definition: each position once, a query with each of its keys, one after another."""
    total = 0.0
    for group in {int(sizes.group[row]) for row in rows}:
        prompt = next(int(sizes.prompt[row]) for row in rows if sizes.group[row] == group)
        total += prompt * arithmetic.position + arithmetic.pair * sum(place + 1 for place in range(prompt))
    for row in rows:
        prompt, completion = int(sizes.prompt[row]), int(sizes.completion[row])
        keys = sum(prompt + place + 1 for place in range(completion - 1))
        total += (completion - 1) * arithmetic.position + arithmetic.pair * keys + completion * arithmetic.target
    return total


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("budget", [1, 450, 2000, 10**6])
@pytest.mark.parametrize("teams", [1, 3, 8])
def test_every_row_is_in_one_pass_within_the_budget(packed: bool, budget: int, teams: int) -> None:
    sizes = sizes_of(0, packed)
    plan = deal(range(320), sizes, budget, teams, LONG)
    assert len(plan) == teams and len({len(share) for share in plan}) == 1
    parts = [part for share in plan for part in share]
    assert sorted(row for part in parts for row in part) == list(range(320))
    assert all(sizes.of(part) <= budget or len(part) == 1 for part in parts)
    for part in parts if packed else []:  # rows of a prompt are neighbours, else it would be computed twice
        groups = sizes.group[part]
        assert not part or len(np.unique(groups)) == 1 + np.count_nonzero(np.diff(groups))


@pytest.mark.parametrize("arithmetic", [LINEAR, LONG], ids=["linear", "long"])
@pytest.mark.parametrize(("teams", "least"), [(2, 0.96), (8, 0.94), (16, 0.92)])
@pytest.mark.parametrize("seed", range(3))
def test_ranks_that_meet_in_each_pass_hardly_wait(seed: int, teams: int, least: float, arithmetic: Arithmetic) -> None:
    sizes = sizes_of(seed)
    costs = [
        [counted(part, sizes, arithmetic) for part in share]
        for share in deal(range(320), sizes, 900, teams, arithmetic)
    ]
    ideal = counted(list(range(320)), sizes, arithmetic) / teams
    assert ideal / sum(max(place) for place in zip(*costs, strict=True)) > least
    # Where they meet once a step, they wait less still.
    assert ideal / max(sum(share) for share in costs) > least


def test_the_dearest_passes_come_first() -> None:
    sizes = sizes_of(1)
    plan = deal(range(320), sizes, 900, 4, LONG)
    slowest = [max(counted(part, sizes, LONG) for part in place) for place in zip(*plan, strict=True)]
    assert slowest == sorted(slowest, reverse=True)


def test_groups_stay_whole_where_nobody_would_wait_less() -> None:
    sizes = Sizes(np.full(128, 30), np.full(128, 50), np.repeat(np.arange(16), 8), True)
    plan = deal(range(128), sizes, 2 * (30 + 8 * 49), 4, LONG)
    assert [sorted(len(part) for part in share) for share in plan] == [[16, 16]] * 4
    assert sum(sizes.of(part) for share in plan for part in share) == sizes.of(range(128))


def test_a_group_is_parted_where_it_would_be_waited_for() -> None:
    """One prompt for all: two ranks share its rows, though each computes the prompt."""
    sizes = Sizes(np.full(8, 10), np.full(8, 100), np.zeros(8, np.int64), True)
    assert [[len(part) for part in share] for share in deal(range(8), sizes, 10_000, 2, LONG)] == [[4], [4]]


def test_one_rank_makes_few_passes() -> None:
    sizes = sizes_of(2)
    (passes,) = deal(range(320), sizes, 900, 1, LONG)
    assert len(passes) <= 1.12 * sizes.of(range(320)) / 900


def test_ranks_without_rows_get_empty_passes() -> None:
    sizes = sizes_of(3)
    plan = deal([5, 6], sizes, 10_000, 4, LONG)
    assert sorted(len(part) for share in plan for part in share) == [0, 0, 1, 1]
    assert deal([], sizes, 10_000, 2, LONG) == [[], []]


def test_the_plan_is_a_function_of_the_batch() -> None:
    sizes = sizes_of(4)
    order = np.random.default_rng(0).permutation(320).tolist()
    assert deal(order, sizes, 900, 8, LONG) == deal(range(320), sizes, 900, 8, LONG)


def test_padded_rows_are_of_like_length() -> None:
    sizes = sizes_of(5, packed=False)
    plan = deal(range(320), sizes, 2000, 4, LONG)
    parts = [part for share in plan for part in share if part]
    assert sizes.useful(range(320)) / sum(sizes.of(part) for part in parts) > 0.93


def test_amounts_by_hand() -> None:
    """Two passes; a group of two (prompt 3, completions 2 and 4) parted, and one of one (prompt 2, completion 1)."""
    sizes = Sizes(np.array([3, 3, 2]), np.array([2, 4, 1]), np.array([0, 0, 1]), True)
    # First pass: the prompt's 1 + 2 + 3 pairs, one input with 4 keys. Second: the prompt again, inputs with 4, 5 and 6
    # keys; the other prompt's 1 + 2, whose completion has no input.
    assert amount([[0], [1, 2]], sizes) == Amount(4 + 6 + 2, 4 + 6 + 2, 7, 6 + 4 + 6 + 15 + 3)
    together = amount([[0, 1], [2]], sizes)
    assert together == Amount(7 + 2, 7 + 2, 7, 6 + 4 + 15 + 3)
    padded = Sizes(sizes.prompt, sizes.completion, sizes.group, False)
    # Rows of 5, 7 and 3 tokens: the first two padded to 7.
    assert amount([[0, 1], [2]], padded) == Amount(14 + 3, 15, 7, 15 + 28 + 6)
