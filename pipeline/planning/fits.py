"""Does a recipe fit this machine? Told from the recipe, the policy's config.json and the machine, in milliseconds.

What is found here needs no process and no weights; what only a trial shows is tried by `pipeline.planning.preflight`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import RequestError
from pipeline.planning.arithmetic import plan
from pipeline.planning.machine import Machine, free_disk
from pipeline.planning.memory import BUCKET_ELEMENTS, HEADROOM, cure, learner_memory, runs_as
from pipeline.planning.terms import Given
from pipeline.policies.shapes import GIB, ITEM, Shape, shape_of, show_bytes
from pipeline.recipe import Recipe

PROCESS_BYTES = 0.5 * GIB
"""What a rank or an engine takes on a CPU before it holds a weight: Python, torch and their libraries."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    fits: bool | None
    """Null: can't be told from here."""
    told: str
    """In numbers."""
    cure: str = ""
    """Which setting mends it."""


def known_shape(recipe: Recipe, policy: Path | None = None) -> Shape | None:
    """The policy's shape; null where it is not at hand, or of a kind that the arithmetic does not cover."""
    try:
        return shape_of(recipe, policy)
    except RequestError:
        return None


def fits(recipe: Recipe, shape: Shape | None, machine: Machine, place: Path) -> list[Check]:
    """All that can be told at once; `place` is where the run's folder lies or will lie."""
    found = [*_counts(recipe, machine), *_lengths(recipe, shape)]
    if shape is None:
        why = "the policy's shape is not known before it is there, or is of a kind that plans don't cover"
        return [*found, Check("memory", None, why)]
    return [
        *found,
        *_heads(recipe, shape),
        *(_on_cards(recipe, shape, machine) if machine.cards else _on_the_host(recipe, shape, machine)),
        *_offload(recipe, shape, machine),
        *_disk(recipe, shape, place),
    ]


def refuse(checks: Sequence[Check]) -> None:
    """Raises RequestError with the first that does not fit, in one line."""
    wrong = [check for check in checks if check.fits is False]
    if wrong:
        more = f" (and {len(wrong) - 1} more: see `oapl preflight`)" if len(wrong) > 1 else ""
        raise RequestError(f"{wrong[0].name}: {wrong[0].told}; {wrong[0].cure}{more}")


def _counts(recipe: Recipe, machine: Machine) -> Iterator[Check]:
    if not machine.cards:
        yield Check("cards", None, "none here, so all computes on the CPU")
        return
    cards, settings = len(machine.cards), recipe.learning
    here, nodes = settings.ranks_a_node, settings.nodes
    spread = f" on each of {nodes} nodes" if nodes > 1 else ""
    told = f"learning.ranks={settings.ranks} want {here} cards{spread}, and {cards} are in sight"
    mend = f"set learning.ranks={cards * nodes}"
    yield Check("learner's cards", here <= cards, told, mend)
    if recipe.generation.engine == "local":
        parallel = recipe.generation.tensor_parallel
        told = f"generation.tensor_parallel={parallel} of {cards} cards"
        yield Check("engine's cards", parallel <= cards, told, f"set generation.tensor_parallel={cards} or less")


def _lengths(recipe: Recipe, shape: Shape | None) -> Iterator[Check]:
    generation, prompts = recipe.generation, recipe.prompts.max_tokens
    wanted, room = generation.max_tokens + (prompts or 1), generation.max_model_len
    first = f"prompts.max_tokens={prompts}" if prompts else "at least one token of a prompt"
    told = f"{first} and generation.max_tokens={generation.max_tokens} in generation.max_model_len={room}"
    yield Check("lengths", wanted <= room, told, f"set generation.max_model_len={wanted}")
    if shape is not None and shape.longest is not None:
        longest = recipe.for_evaluation().max_model_len
        told = f"{longest:,} positions are asked for (generation.max_model_len and evaluation.max_tokens), and the "
        told += f"policy knows {shape.longest:,}"
        name = "generation.max_model_len" if generation.max_model_len > shape.longest else "evaluation.max_tokens"
        yield Check("positions", longest <= shape.longest, told, f"lower {name}")


def _heads(recipe: Recipe, shape: Shape) -> Iterator[Check]:
    for name, parts in (
        ("generation.tensor_parallel", recipe.generation.tensor_parallel),
        ("learning.sequence_parallel", recipe.learning.sequence_parallel),
    ):
        if parts > 1:
            good = [n for n in range(1, parts) if shape.heads % n == 0]
            told = f"{shape.heads} attention heads in {name}={parts} parts"
            yield Check("heads", shape.heads % parts == 0, told, f"set {name}={good[-1]}")


def _on_cards(recipe: Recipe, shape: Shape, machine: Machine) -> Iterator[Check]:
    card = machine.card_memory
    if card is None:
        yield Check("memory", None, "the cards don't tell how much they have")
        return
    stage, settings = runs_as(recipe.learning), recipe.learning
    needed = learner_memory(recipe, shape, stage, card).total(settings.activation_checkpointing)
    told = f"a rank takes {show_bytes(needed)}, and {HEADROOM:.0%} of a card's {card:g} GiB are planned for"
    yield Check("learner's memory", needed <= HEADROOM * card * GIB, told, cure(recipe, shape, HEADROOM * card * GIB))
    for what, told_recipe in (("engine's memory", recipe), ("engine's memory, evaluation", _evaluating(recipe))):
        longest = told_recipe.generation.max_model_len
        made = plan(told_recipe, shape, Given(gpu_memory=card))
        sequence, room = made.value("cache_sequence"), made.value("cache_room")
        told = f"{show_bytes(room)} for keys and values beside the weights, and a sequence of {longest:,} tokens takes "
        told += show_bytes(sequence)
        mend = "raise generation.tensor_parallel or generation.gpu_memory_utilization, or lower max_model_len"
        yield Check(what, sequence <= room, told, mend)


def _evaluating(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"generation": recipe.for_evaluation()})


def _on_the_host(recipe: Recipe, shape: Shape, machine: Machine) -> Iterator[Check]:
    settings, generation, free = recipe.learning, recipe.generation, machine.free * GIB
    rank = learner_memory(recipe, shape, runs_as(settings))
    # On a host a buffer takes memory where it is written to, and no more is written than there are gradients.
    bucket = min(rank.bucket, BUCKET_ELEMENTS * 4.0, shape.parameters * ITEM[settings.dtype])
    one = rank.total(settings.activation_checkpointing) - rank.bucket + bucket + PROCESS_BYTES
    needed = settings.ranks_a_node * one + rank.host / settings.nodes
    ranks = f"{settings.ranks_a_node} rank{'s' * (settings.ranks_a_node > 1)}"
    told = f"{ranks} of the learner, {show_bytes(needed)} in all, and {show_bytes(free)} of the host are free"
    mend = cure(recipe, shape, free / settings.ranks_a_node - PROCESS_BYTES, cards=False)
    yield Check("learner's memory", needed <= free, told, mend)
    if generation.engine == "local":
        weights, cache = shape.parameters * ITEM[generation.dtype], generation.kv_cache_gib * GIB
        told = f"{show_bytes(weights)} of weights and generation.kv_cache_gib={generation.kv_cache_gib:g} of "
        told += f"{show_bytes(free)} that are free"
        mend = "lower generation.kv_cache_gib, or take a smaller policy"
        yield Check("engine's memory", weights + cache + PROCESS_BYTES <= free, told, mend)
        longest = recipe.for_evaluation().max_model_len
        needed = shape.cache(ITEM[generation.dtype]) * longest
        told = f"one sequence of {longest:,} tokens takes {show_bytes(needed)} of generation.kv_cache_gib="
        told += f"{generation.kv_cache_gib:g}"
        # vLLM on a CPU takes whole GiB.
        room = max(1, round(generation.kv_cache_gib)) * GIB
        mend = f"set generation.kv_cache_gib={-(-needed // GIB):.0f}, or lower generation.max_model_len"
        yield Check("engine's cache", needed <= room, told, mend)


def _offload(recipe: Recipe, shape: Shape, machine: Machine) -> Iterator[Check]:
    settings = recipe.learning
    if settings.offload == "none" or not machine.cards:
        return
    needed = learner_memory(recipe, shape, runs_as(settings)).host / settings.nodes
    told = f"learning.offload={settings.offload} keeps {show_bytes(needed)} in the host's memory, of which "
    told += f"{show_bytes(machine.free * GIB)} are free"
    yield Check("host's memory", needed <= machine.free * GIB, told, "set learning.offload=none, or take more nodes")


def _disk(recipe: Recipe, shape: Shape, place: Path) -> Iterator[Check]:
    made = plan(recipe.model_copy(update={"rounds": 1}), shape, Given())
    values = {line.key: line.value for line in made.lines if line.part == "disk"}
    free = free_disk(place) * GIB
    # A snapshot comes on top of the one that is learned from; how long completions get is not known before.
    weights = 2 * values["snapshot_bytes"] + values.get("state_bytes", 0.0) + values.get("checkpoint_bytes", 0.0)
    most = 2 * (values["rollout_bytes"] + values["verdict_bytes"]) + values.get("reference_bytes", 0.0)
    told = f"a round writes {show_bytes(weights)} of weights and moments and at most {show_bytes(most)} of rollouts, "
    told += f"and {show_bytes(free)} are free in {place}"
    mend = "give another --root, or set learning.checkpoint_every=0 or learning.keep_optimizer=false"
    yield Check("disk", weights <= free, told, mend)
