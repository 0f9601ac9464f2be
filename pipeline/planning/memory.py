"""Memory of a rank of the learner, and what to change where something does not fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.logits import logit_rows
from pipeline.planning.terms import Given, Memory, Plan
from pipeline.policies.shapes import GIB, ITEM, Shape, show_bytes
from pipeline.recipe import Learning, Recipe

BUCKET_ELEMENTS = 500_000_000
"""Gradients that DeepSpeed gathers before it reduces them (its default reduce_bucket_size), allocated whole."""
LIVE_ELEMENTS = 1_000_000_000
"""Weights that ZeRO-3 holds gathered at a time, at most (its default stage3_max_live_parameters)."""
HEADROOM = 0.9
"""Share of a card that the learner is planned to fill; CUDA itself and fragments take of the rest."""
LONGEST_LAG = 400
"""Optimizer steps between the policies that generate and learn, up to which OAPL is reported stable."""


def runs_as(settings: Learning) -> int:
    """bfloat16 needs float32 masters, which DeepSpeed keeps from stage 1 on."""
    return max(settings.zero_stage, 1) if settings.dtype == "bfloat16" else settings.zero_stage


def pass_tokens(recipe: Recipe) -> int:
    """Positions of the largest forward pass on one rank: the budget, or its share of one longest sequence."""
    longest = math.ceil(recipe.generation.max_model_len / recipe.learning.sequence_parallel)
    return max(recipe.learning.micro_batch_tokens, longest)


@dataclass(frozen=True, slots=True)
class _Factors:
    """What the numbers of all stages are made from."""

    item: int
    """Bytes of a weight."""
    whole: int
    """Weights there are, adapters included."""
    learned: int
    """Weights that are learned."""
    tokens: int
    chunk: int
    """Rows of logits that are made at a time."""
    kept: int
    """Rows that are kept for the backward pass."""
    layer: int
    """Bytes that a layer keeps a token."""
    outer: int
    """Bytes a token of the last norm and its outputs that are scored."""


def _factors(recipe: Recipe, shape: Shape, card: float | None) -> _Factors:
    settings = recipe.learning
    item, tokens = ITEM[settings.dtype], pass_tokens(recipe)
    adapters = shape.adapters(settings.lora_rank) if settings.lora_rank else 0
    rows = logit_rows(shape.vocabulary, card and card * GIB)
    in_flash = settings.attention in ("varlen", "flash", "flex") or (settings.attention == "auto" and item == 2)
    return _Factors(
        item,
        whole=shape.parameters + adapters,
        learned=adapters or shape.parameters,
        tokens=tokens,
        chunk=min(tokens, rows.chunk),
        kept=min(tokens, rows.kept),
        layer=shape.activations(item, flash=in_flash and settings.packing),
        outer=(4 + 2 * item) * shape.hidden,
    )


def learner_memory(recipe: Recipe, shape: Shape, stage: int, card: float | None = None) -> Memory:
    """One rank under that ZeRO stage, everything else as in the recipe; `card` is its memory in GiB, where it is known.

    Source of the shares: Rajbhandari et al. 2020 (arXiv 1910.02054); of the rest: DeepSpeed 0.19's buffers and what
    `trainer/logprobs.py` makes.
    """
    settings, of = recipe.learning, _factors(recipe, shape, card)
    stage = max(stage, 1) if settings.dtype == "bfloat16" else stage
    ranks, half = settings.ranks, of.item == 2
    shares = [ranks if stage >= least else 1 for least in (3, 2, 1)]
    weights = of.whole * of.item / shares[0]
    # In bfloat16 gradients are summed in float32. Whole, that is beside those that the backward pass leaves.
    gradients = of.learned * (6 if half and stage == 1 else 4) / shares[1]
    optimizer = of.learned * (12 if stage else 8) / shares[2]
    # Up to stage 2, in bfloat16, the sums themselves are stepped on; else a rank makes a copy of its part.
    step = 4 * of.learned / ranks if stage and (stage == 3 or not half) else 0.0
    step = min(step, 4.0 * LIVE_ELEMENTS) if stage == 3 else step
    host = 0.0
    if settings.offload != "none" and stage >= {"optimizer": 1, "all": 3}[settings.offload]:
        host = ranks * optimizer + 4 * of.learned  # and gradients, as float32
        optimizer = step = 0.0
        if settings.offload == "all":
            host, weights = host + ranks * weights, 0.0
    own_head = stage < 3 and not settings.lora_rank
    return Memory(
        stage,
        weights,
        gradients,
        optimizer,
        gathered=min(of.whole, LIVE_ELEMENTS) * of.item if stage == 3 else 0,
        bucket=BUCKET_ELEMENTS * _bucket_item(half, stage),
        logits=shape.vocabulary * (4 * (of.kept + 2 * of.chunk) + (2 * of.chunk if half else 0)),
        head_gradient=shape.embedding * (6 if half else 4) if own_head else 0,
        activations=of.tokens * (shape.layers * of.layer + of.outer),
        activations_checkpointed=of.tokens * (shape.layers * shape.hidden * of.item + of.outer),
        layer=of.tokens * of.layer,
        step=step,
        host=host,
    )


def _bucket_item(half: bool, stage: int) -> int:
    """Bytes of an element on its way through a reduction: bfloat16 is sent as float32, from a copy."""
    return 0 if not stage else 6 if half and stage > 1 else 4


def memory_formulas(recipe: Recipe, shape: Shape, card: float | None = None) -> dict[str, str]:
    """How each number of `learner_memory` comes about, in numbers; P are the weights that are learned."""
    settings, of = recipe.learning, _factors(recipe, shape, card)
    item, ranks, half = of.item, settings.ranks, of.item == 2
    weights = f"{of.whole:,}" if settings.lora_rank else "P"
    made = {
        "weights": f"{item} x {weights}, in stage 3 / {ranks} ranks",
        "gradients": f"{'6 x P, in float32 and as they come; 4' if half else '4'} x P / {ranks} from stage 2",
        "optimizer": f"8 x P, and 4 x P of masters from stage 1, both / {ranks}; in stage 0 whole and without masters",
        "gathered": f"{item} x {min(of.whole, LIVE_ELEMENTS):,} weights, stage 3 alone",
        "bucket": f"4 x {BUCKET_ELEMENTS:,} from stage 1{', 6 x from stage 2' if half else ''}",
        "logits": f"4 x {shape.vocabulary:,} words x ({of.kept:,} kept + {2.5 if half else 2} x {of.chunk:,} at work)",
        "head_gradient": f"{6 if half else 4} x {shape.vocabulary:,} x {shape.hidden:,}, stages 0 to 2",
        "activations": f"{of.tokens:,} tokens x ({shape.layers} layers x {of.layer:,} + {of.outer:,} bytes)",
        "activations_checkpointed": f"{of.tokens:,} x ({shape.layers} x {item} x {shape.hidden:,} + {of.outer:,})",
        "layer": f"{of.tokens:,} x {of.layer:,}",
        "step": f"4 x P / {ranks}, {'stage 3 alone' if half else 'from stage 1'}",
        "total": "weights to bucket + the largest of: the step's; activations + logits + output matrix",
        "total_checkpointed": "the same, or: checkpointed activations + the layer at work",
    }
    if settings.lora_rank:
        made |= {"learned": f"P = {of.learned:,} weights of adapters", "head_gradient": "none: it is not learned"}
    if settings.offload != "none":
        made["host"] = f"(8 + 4 of masters + 4 of gradients) x P{' + the weights' if settings.offload == 'all' else ''}"
    return made


def advice(recipe: Recipe, shape: Shape, given: Given, made: Plan) -> Iterator[str]:
    settings, generation = recipe.learning, recipe.generation
    if given.gpu_memory is not None:
        yield from _fitting(recipe, shape, given.gpu_memory, made)
        if not made.value("fit_longest"):
            yield (
                f"engine: not one rollout of {generation.max_model_len:,} tokens fits beside the weights; raise "
                "generation.tensor_parallel or lower generation.max_model_len"
            )
        elif made.value("fit_longest") < generation.max_num_seqs:
            yield (
                f"engine: {made.value('fit_longest'):,.0f} of generation.max_num_seqs={generation.max_num_seqs} fit at "
                "full length; those beyond wait or are computed again, which costs time and changes no token"
            )
    longest = recipe.for_evaluation().max_model_len
    if shape.longest is not None and longest > shape.longest:
        yield f"the model knows {shape.longest:,} positions, and {longest:,} are asked for; lower max_tokens"
    if settings.micro_batch_tokens * settings.sequence_parallel < generation.max_model_len:
        yield (
            f"learner: one sequence may have {generation.max_model_len:,} tokens, more than "
            f"learning.micro_batch_tokens={settings.micro_batch_tokens:,}; memory is by the sequence, which "
            "learning.sequence_parallel shares among ranks"
        )
    if given.gpus is not None and settings.ranks > given.gpus:
        yield f"learner: learning.ranks={settings.ranks} are more than {given.gpus} cards; set learning.ranks"
    if given.gpus is not None and given.gpus > generation.tensor_parallel:
        yield (
            f"engine: `oapl run` starts one engine, on {generation.tensor_parallel}; for all {given.gpus}, give "
            "each engine a share of the prompts with `oapl generate`, and join them with `oapl rollouts merge`"
        )
    if made.value("steps") > LONGEST_LAG:
        yield (
            f"a round of {made.value('steps'):,.0f} steps lags further than the {LONGEST_LAG} reported as stable; "
            "--uniform-share says how many groups will be dropped from it"
        )
    if not (given.tokens_per_second and given.train_tokens_per_second):
        yield (
            "hours need throughputs: give --tokens-per-second and --train-tokens-per-second, or make a round of few "
            "prompts (--set name=trial --set prompts.per_round=64) and give --measured its folder"
        )
    if given.mean_tokens is None:
        yield "every completion is taken to be of full length; give --mean-tokens"


def _fitting(recipe: Recipe, shape: Shape, gpu_memory: float, made: Plan) -> Iterator[str]:
    room = HEADROOM * gpu_memory * GIB
    needed = made.memory[made.stage].total(made.checkpointing)
    if needed <= room:
        yield f"learner: fits; a rank takes {show_bytes(needed)} of {gpu_memory:g} GiB"
    else:
        what = f"learner: a rank takes {show_bytes(needed)}, more than {HEADROOM:.0%} of {gpu_memory:g} GiB"
        yield f"{what}; {cure(recipe, shape, room)}"


def cure(recipe: Recipe, shape: Shape, room: float, *, cards: bool = True) -> str:
    """What to change, one thing after another, until a rank of the learner fits into so many bytes."""
    changes: dict[str, str] = {}
    card = room / HEADROOM / GIB if cards else None
    planned = learner_memory(recipe, shape, runs_as(recipe.learning), card)
    least = planned.total(recipe.learning.activation_checkpointing)
    settings = recipe.learning
    for change in _changes(recipe, cards):
        settings = settings.model_copy(update=change)
        changes |= {name: f"learning.{name}={str(value).lower()}" for name, value in change.items()}
        changed = recipe.model_copy(update={"learning": settings})
        trial = learner_memory(changed, shape, settings.zero_stage, card)
        least = trial.total(settings.activation_checkpointing)
        if least <= room:
            host = f", with {show_bytes(trial.host)} of the host's memory" if trial.host else ""
            return f"set {' '.join(changes.values())}, and it takes {show_bytes(least)}{host}"
    more = f" (it takes {show_bytes(least)} with {' '.join(changes.values())})" if changes else ""
    return f"take more ranks, or shorter sequences{more}"


def _changes(recipe: Recipe, cards: bool) -> Iterator[dict[str, Any]]:
    """Settings that save memory, the cheapest first; without cards there is nothing to move to the host from."""
    settings = recipe.learning
    longest = math.ceil(recipe.generation.max_model_len / settings.sequence_parallel)
    if settings.micro_batch_tokens > longest:
        yield {"micro_batch_tokens": longest}
    if not settings.activation_checkpointing:
        yield {"activation_checkpointing": True}
    if settings.ranks > 1:
        for stage in range(settings.zero_stage + 1, 4):
            yield {"zero_stage": stage}
    if not cards:
        return
    if settings.offload == "none":
        yield {"offload": "optimizer", "zero_stage": 3 if settings.ranks > 1 else max(1, settings.zero_stage)}
    if settings.offload != "all":
        yield {"offload": "all", "zero_stage": 3}
