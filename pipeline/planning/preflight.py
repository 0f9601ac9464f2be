"""A recipe tried before anything is generated: what fits is told at once, what only a trial shows is tried once.

The trials are processes of their own: the engine started at full length, and two steps of the learner on random
tokens of full length, under all that the recipe says. What they took is kept in the run's folder, with what it was
found for; nothing is tried again until the recipe, the policy's shape or the machine is another.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.planning.fits import Check, fits, known_shape, refuse
from pipeline.planning.machine import Machine, this_machine
from pipeline.planning.memory import cure, learner_memory, runs_as
from pipeline.policies.shapes import GIB, Shape, show_bytes
from pipeline.recipe import Recipe
from pipeline.storage.durable import write_durably

SKIP = "OAPL_PREFLIGHT"
"""0: nothing is tried; the checks that take no time are made all the same."""
SMALL = 0.1
"""Share of the host's free memory below which a policy that was made here is not tried on a CPU."""
Start = Callable[[str, str, Sequence[object]], None]
"""Runs `python -m module words` to its end under a name, and raises with its one line where it fails."""


@dataclass(frozen=True, slots=True)
class Trial:
    name: str
    module: str


ENGINE = Trial("preflight engine", "pipeline.generation.rehearsal")
LEARNER = Trial("preflight learner", "trainer.rehearsal")


def check(recipe: Recipe, place: Path, policy: Path | None = None) -> list[Check]:
    """What can be told at once; `place` is where the run is or will be. Raises RequestError where it does not fit."""
    found = fits(recipe, known_shape(recipe, policy), this_machine(), place)
    refuse(found)
    return found


def refuse_learner(recipe: Recipe, policy: Path) -> None:
    """Raises RequestError where the learner alone, on data that is there, can't work on this machine."""
    named = ("learner's cards", "learner's memory", "host's memory", "heads")
    found = fits(recipe, known_shape(recipe, policy), this_machine(), Path())
    refuse([one for one in found if one.name in named and "generation." not in one.told])


def cure_of(recipe: Recipe, policy: Path) -> str:
    """What to set where a rank had too little memory though the plan said that it fits: the next saving."""
    shape = known_shape(recipe, policy)
    longest = recipe.generation.max_model_len
    if shape is None:
        return f"it was at {longest:,} tokens; lower generation.max_model_len or raise learning.zero_stage"
    machine = this_machine()
    rank = learner_memory(recipe, shape, runs_as(recipe.learning), machine.card_memory)
    needed = rank.total(recipe.learning.activation_checkpointing)
    planned = f"the plan foretold {show_bytes(needed)} for a pass of {longest:,} tokens"
    return f"{planned}; {cure(recipe, shape, 0.75 * needed, cards=bool(machine.cards))}"


def trials(recipe: Recipe, shape: Shape | None, machine: Machine) -> tuple[list[Trial], str]:
    """What is to be tried, and why that is not all."""
    if os.environ.get(SKIP) == "0":
        return [], "nothing is tried, as was asked for"
    if machine.busy:
        return [], "others work on the cards, so nothing is tried"
    if shape is not None and not machine.cards and recipe.policy.cold_start and _is_small(recipe, shape, machine):
        return [], "a small policy of our own making on a CPU: nothing is tried"
    if recipe.generation.engine == "ray":
        return [LEARNER], "the engines are on a Ray cluster, and not tried from here"
    return [ENGINE, LEARNER], ""


def _is_small(recipe: Recipe, shape: Shape, machine: Machine) -> bool:
    settings = recipe.learning
    rank = learner_memory(recipe, shape, runs_as(settings))
    needed = settings.ranks * (rank.total(settings.activation_checkpointing) - rank.bucket)
    usual = (
        settings.attention in ("auto", "sdpa", "eager") and settings.offload == "none" and settings.launcher == "local"
    )
    return usual and needed <= SMALL * machine.free * GIB


def identity(recipe: Recipe, policy: Path, machine: Machine) -> str:
    """Of all that a trial's result hangs on: not of the weights, which change each round."""
    told = {
        "recipe": recipe.model_dump(mode="json", include={"generation", "learning", "evaluation", "policy"}),
        "policy": json.loads((policy / "config.json").read_text(encoding="utf-8")),
        "machine": machine.identity(),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def rehearse(recipe: Recipe, recipe_file: Path, policy: Path, mark: Path, start: Start) -> dict[str, Any]:
    """Tries what is to be tried, unless `mark` says that it was; returns what the mark then holds.

    Raises RequestError where it can't fit, and what `start` raises where a trial fails; no mark is left then.
    """
    machine = this_machine()
    shape, own = known_shape(recipe, policy), identity(recipe, policy, machine)
    checks = fits(recipe, shape, machine, mark.parent)
    refuse(checks)
    wanted, why = trials(recipe, shape, machine)
    kept = read_mark(mark)
    if kept.get("identity") == own and (kept["trials"] or not wanted):
        return kept
    results = {}
    for trial in wanted:
        result = mark.with_name(f".{trial.name.replace(' ', '-')}.json")
        result.unlink(missing_ok=True)
        start(trial.name, trial.module, ["--recipe", recipe_file, "--policy", policy, "--out", result])
        results[trial.name.removeprefix("preflight ")] = json.loads(result.read_bytes())
        result.unlink()
    if "learner" in results and shape is not None:
        planned = learner_memory(recipe, shape, runs_as(recipe.learning), machine.card_memory)
        results["learner"]["planned_bytes"] = planned.total(recipe.learning.activation_checkpointing)
    told: dict[str, Any] = {"identity": own, "machine": machine.identity(), "trials": results, "left_out": why}
    told["checks"] = [asdict(one) for one in checks]
    write_durably(mark, (json.dumps(told, indent=1) + "\n").encode())
    return told


def read_mark(mark: Path) -> dict[str, Any]:
    """What was found before; empty where nothing was, or where it can't be read and is found again."""
    try:
        found: dict[str, Any] = json.loads(mark.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if {"identity", "trials"} <= found.keys() else {}


def one_line(told: dict[str, Any]) -> str:
    """What the mark holds, for a terminal: `engine starts in 41 s; learner ...`."""
    why = [str(told["left_out"])] if told["left_out"] else []
    return "; ".join([*_parts(told["trials"]), *why])


def _parts(found: dict[str, Any]) -> Iterator[str]:
    if "engine" in found:
        yield f"the engine starts in {found['engine']['seconds']:.0f} s, for {found['engine']['longest']:,} tokens"
    if "learner" in found:
        one = found["learner"]
        plan = f" ({show_bytes(one['planned_bytes'])} planned)" if "planned_bytes" in one else ""
        yield (
            f"a step of the learner at {one['longest']:,} tokens takes {show_bytes(one['peak_bytes'])}{plan} on "
            f"{one['device']}, {one['tokens_per_second']:,.0f} tokens/s"
        )
