"""What is compared with what: the cells of a comparison, each a recipe of its own, checked before anything starts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from pipeline.errors import RequestError
from pipeline.recipe import Learning, Recipe, load_recipe

LOSSES: tuple[str, ...] = get_args(Learning.model_fields["loss"].annotation)
OWN = ("name", "seed", "rounds", "lag_rounds", "prompts.per_round")
"""Settings that the comparison decides."""
SHARED = ("epochs", "batch_size", "drop_uniform_groups", "replay_rounds")
"""Settings of learning on which the number of samples or steps of a round hangs."""
EVEN = ("learning.epochs=1", "learning.drop_uniform_groups=false", "learning.replay_rounds=0")
"""What a comparison changes of a recipe unless told: every sample is learned from once, and every round has the same
number of steps, however many groups happen to have no variance under one loss or the other."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One of the things compared: a loss, or a variant with settings of its own."""

    name: str
    changes: tuple[str, ...]
    """`learning.*` overrides."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A round that was generated before, to learn from without generating anew."""

    run: Path
    round: int


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm at one lag under one seed."""

    arm: Arm
    lag: int | None
    """Optimizer steps between snapshots; None: what the stored round gives."""
    recipe: Recipe
    base: Recipe
    """The same without the arm's changes; all arms of a lag and seed share its start, prompts and first samples."""

    @property
    def seed(self) -> int:
        return self.recipe.seed


def arms(losses: str | None, variants: Sequence[str]) -> list[Arm]:
    """The losses of `oapl,grpo` and the variants of `name:key=value,key=value`, in this order.

    A variant named like one of the losses adds its settings to that loss. Raises RequestError in one line.
    """
    found: dict[str, tuple[str, ...]] = {}
    for loss in _items(losses or "", "--loss"):
        if loss not in LOSSES:
            raise RequestError(f"--loss {loss}: no such loss; known are {', '.join(LOSSES)}")
        found[loss] = (f"learning.loss={loss}",)
    for variant in variants:
        name, colon, told = variant.partition(":")
        if not colon or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or name.startswith("start-"):
            raise RequestError(f"--variant {variant!r}: expected name:learning.key=value,learning.key=value")
        changes = _items(told, f"--variant {name}")
        for change in changes:
            if not change.startswith("learning.") or "=" not in change:
                raise RequestError(
                    f"--variant {name}: {change!r} is no learning.key=value; all else is shared, give it with --set"
                )
        found[name] = (*found.get(name, ()), *changes)
    if not found:
        raise RequestError("nothing to compare: give --loss oapl,grpo or some --variant name:learning.key=value")
    return [Arm(name, changes) for name, changes in found.items()]


def numbers(text: str, option: str, least: int) -> list[int]:
    """`8,64` as numbers without repeats. Raises RequestError in one line."""
    try:
        found = [int(item) for item in _items(text, option)]
    except ValueError:
        raise RequestError(f"{option} {text!r}: expected whole numbers such as 8,64") from None
    if not found or min(found) < least:
        raise RequestError(f"{option} {text!r}: expected numbers of {least} or more")
    return list(dict.fromkeys(found))


def _items(text: str, option: str) -> list[str]:
    items = [item.strip() for item in text.split(",")] if text.strip() else []
    if not all(items):
        raise RequestError(f"{option} {text!r}: something is missing between the commas")
    return items


def fresh(
    recipe: str,
    overrides: Sequence[str],
    compared: Iterable[Arm],
    lags: Iterable[int],
    seeds: Iterable[int],
    steps: int,
) -> list[Cell]:
    """The cells of a comparison that samples its own rounds: `steps` optimizer steps, a snapshot every `lag` of them.

    Each round samples what its steps need: `lag * batch_size / epochs` completions. Raises RequestError where that
    does not come out even, or where an arm would have other samples or steps than the rest.
    """
    _refuse_own(overrides)
    chosen = list(compared)
    for arm in chosen:
        for change in arm.changes:
            key = change.partition("=")[0].strip()
            if key.removeprefix("learning.") in SHARED:
                raise RequestError(
                    f"--variant {arm.name}: {key} would give it other samples or steps than the rest; use --set"
                )
    cells = []
    for seed in seeds:
        for lag in lags:
            told = [*EVEN, *overrides, f"seed={seed}", f"rounds={rounds_of(steps, lag)}"]
            told.append(f"prompts.per_round={_per_round(load_recipe(recipe, told), lag)}")
            base = load_recipe(recipe, [*told, f"name=start-lag{lag}-seed{seed}"])
            _refuse_uneven(base)
            for arm in chosen:
                named = f"name={arm.name}-lag{lag}-seed{seed}"
                cells.append(Cell(arm, lag, load_recipe(recipe, [*told, *arm.changes, named]), base))
    return cells


def rounds_of(steps: int, lag: int) -> int:
    """Rounds of `lag` steps in `steps`. Raises RequestError where they do not come out even."""
    if steps < lag or steps % lag:
        raise RequestError(f"--steps {steps}: not a multiple of lag {lag}; every round has as many steps")
    return steps // lag


def _per_round(recipe: Recipe, lag: int) -> int:
    learning, samples = recipe.learning, recipe.generation.samples
    prompts, rest = divmod(lag * learning.batch_size, learning.epochs * samples)
    if rest or not prompts:
        raise RequestError(
            f"--lag {lag}: {lag} steps of {learning.batch_size} sequences are no whole number of groups of {samples} "
            f"learned {learning.epochs} times; change learning.batch_size, learning.epochs or generation.samples"
        )
    return prompts


def _refuse_uneven(recipe: Recipe) -> None:
    for name in ("drop_uniform_groups", "replay_rounds"):
        if getattr(recipe.learning, name):
            raise RequestError(
                f"learning.{name}: rounds would differ in their number of steps; use it with --rollouts alone"
            )


def _refuse_own(overrides: Sequence[str]) -> None:
    for override in overrides:
        key = override.partition("=")[0].strip()
        if key in OWN:
            raise RequestError(f"--set {key}: the comparison decides it; see --lag, --steps and --seeds")


def stored(recipe: str, overrides: Sequence[str], compared: Iterable[Arm], seeds: Iterable[int]) -> list[Cell]:
    """The cells of a comparison that learns from one stored round: each arm learns it once, in each seed's order."""
    _refuse_own(overrides)
    chosen = list(compared)
    cells = []
    for seed in seeds:
        told = [*overrides, f"seed={seed}", "rounds=1"]
        base = load_recipe(recipe, [*told, f"name=start-seed{seed}"])
        for arm in chosen:
            named = f"name={arm.name}-seed{seed}"
            cells.append(Cell(arm, None, load_recipe(recipe, [*told, *arm.changes, named]), base))
    return cells
