"""What a recipe takes, before it is started: tokens, steps, hours, memory and disk, as plain arithmetic.

Nothing is loaded and nothing is measured here. Each number is a line that says what it was computed from, so that a
reader can follow it by hand. What is not in the recipe (lengths, throughputs, the hardware) comes as `Given`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from pipeline.errors import RequestError
from pipeline.planning.memory import advice, learner_memory, memory_formulas, pass_tokens, runs_as
from pipeline.planning.terms import Given, Line, Plan
from pipeline.policies.shapes import GIB, ITEM, Shape, show_bytes
from pipeline.recipe import Recipe

BYTES_PER_ROLLOUT = 22
"""What a rollout takes beside its completion: ids, seed, its share of prompt and Parquet's footers."""
BYTES_PER_VERDICT = 18
BYTES_PER_REFERENCE = 3.5
"""Bytes of a recomputed log-probability."""


def plan(recipe: Recipe, shape: Shape, given: Given) -> Plan:
    """All numbers of the recipe. Raises RequestError where what is given contradicts it."""
    _refuse_nonsense(recipe, given)
    lines = [*_model(shape), *_tokens(recipe, given)]
    values = {line.key: line.value for line in lines}
    lines += [*_time(recipe, given, values), *_engine(recipe, shape, given), *_disk(recipe, shape, given, values)]
    memory = [learner_memory(recipe, shape, stage, given.gpu_memory) for stage in range(4)]
    settings = recipe.learning
    formulas, longest = memory_formulas(recipe, shape, given.gpu_memory), pass_tokens(recipe)
    checkpointing = settings.activation_checkpointing
    made = Plan(recipe.name, shape, lines, memory, formulas, runs_as(settings), checkpointing, longest, [])
    return replace(made, advice=list(advice(recipe, shape, given, made)))


def _refuse_nonsense(recipe: Recipe, given: Given) -> None:
    named = {
        "--mean-tokens": given.mean_tokens,
        "--tokens-per-second": given.tokens_per_second,
        "--train-tokens-per-second": given.train_tokens_per_second,
        "--verdicts-per-second": given.verdicts_per_second,
        "--gpus": given.gpus,
        "--gpu-memory": given.gpu_memory,
    }
    for name, value in named.items():
        if value is not None and not 0 < value < float("inf"):
            raise RequestError(f"{name} must be a number above 0, not {value:g}")
    if not 0 <= given.uniform < 1:
        raise RequestError(f"--uniform-share must be at least 0 and below 1, not {given.uniform:g}")
    if given.mean_tokens is not None and given.mean_tokens > recipe.generation.max_tokens:
        raise RequestError(
            f"--mean-tokens {given.mean_tokens:g} is more than generation.max_tokens {recipe.generation.max_tokens}"
        )


def _number(value: float) -> str:
    """For a formula: whole from a thousand on, else four digits."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _model(shape: Shape) -> Iterator[Line]:
    extra = {"qwen2": ", and biases of query, key and value", "qwen3": ", and norms of query and key"}
    attention = f"2 x {shape.hidden:,} x ({shape.query:,} + {shape.key:,}) attention"
    mlp = f"3 x {shape.hidden:,} x {shape.mlp:,} MLP"
    how = f"{attention} + {mlp} + 2 x {shape.hidden:,} norms{extra.get(shape.kind, '')}"
    yield Line("model", "layer_parameters", "parameters of a layer", shape.layer, how)
    how = f"{1 if shape.tied else 2} x {shape.vocabulary:,} x {shape.hidden:,} words + {shape.layers} layers + a norm"
    yield Line("model", "parameters", "parameters P", shape.parameters, how)


def _tokens(recipe: Recipe, given: Given) -> Iterator[Line]:
    generation, settings, told = recipe.generation, recipe.learning, recipe.evaluation
    completions = recipe.prompts.per_round * generation.samples
    how = f"{recipe.prompts.per_round:,} prompts x {generation.samples} samples"
    yield Line("tokens", "completions", "completions a round", completions, how)
    mean = given.mean_tokens or generation.max_tokens
    bound = "" if given.mean_tokens else " (the most there can be)"
    tokens = completions * mean
    yield Line("tokens", "tokens", "tokens generated a round", tokens, f"{completions:,} x {_number(mean)}{bound}")
    share = 1 - given.uniform if settings.drop_uniform_groups else 1.0
    sequences = completions * share
    steps = max(1, int(sequences * settings.epochs) // settings.batch_size)
    kept = f" x {share:.3g} with variance" if share < 1 else ""
    how = f"{completions:,}{kept} x {_count(settings.epochs, 'epoch')} / {settings.batch_size} sequences"
    yield Line("tokens", "steps", "optimizer steps a round", steps, how)
    learned = min(steps * settings.batch_size, sequences * settings.epochs)
    how = f"{steps:,} steps x {settings.batch_size} x {_number(mean)}"
    yield Line("tokens", "learned_tokens", "tokens learned from a round", learned * mean, how)
    length = given.evaluation_tokens or given.mean_tokens or recipe.for_evaluation().max_tokens
    prompts = recipe.prompts.heldout_count
    how = f"{prompts} prompts x {told.samples} samples x {_number(length)}{bound}"
    evaluated = prompts * told.samples * length
    yield Line("tokens", "evaluation_tokens", "tokens of an evaluation", evaluated, how)
    how = f"{_count(recipe.rounds, 'round')} + {recipe.rounds + 1} evaluations, the start's among them"
    in_all = recipe.rounds * tokens + (recipe.rounds + 1) * evaluated
    yield Line("tokens", "run_tokens", "tokens generated in the run", in_all, how)


def _time(recipe: Recipe, given: Given, values: dict[str, float]) -> Iterator[Line]:
    """Hours of what has a throughput, and the arithmetic of learning, which has none."""
    stages = _stage_hours(recipe, given, values)
    cards = {"verification": 0, "learning": recipe.learning.ranks}
    for stage, (hours, how) in stages.items():
        count = cards.get(stage, recipe.generation.tensor_parallel)
        if count:
            name = f"{stage}, card hours"
            yield Line(
                "time", f"{stage}_gpu_hours", name, hours * count, f"{how} / 3,600 x {_count(count, 'card')}", "hours"
            )
        else:
            yield Line("time", f"{stage}_hours", f"{stage}, hours without a card", hours, f"{how} / 3,600", "hours")
    if {"generation", "evaluation", "learning"} <= stages.keys():
        yield from _sums(recipe, given, {stage: hours for stage, (hours, _) in stages.items()})
    factor = 8 if recipe.learning.activation_checkpointing else 6
    work = factor * values["parameters"] * values["learned_tokens"] / 1e15
    how = f"{factor} x P x tokens learned from; attention and prompts on top"
    yield Line("time", "learning_work", "arithmetic of learning a round", work, how, "PFLOP")


def _stage_hours(recipe: Recipe, given: Given, values: dict[str, float]) -> dict[str, tuple[float, str]]:
    """Hours by the clock of one engine, of the verifiers and of all ranks, and how they come about."""
    evaluating = given.evaluation_tokens_per_second or given.tokens_per_second
    throughputs = {
        "generation": (values["tokens"], "tokens", given.tokens_per_second, 0.0),
        "verification": (values["completions"], "verdicts", given.verdicts_per_second, 0.0),
        "learning": (values["learned_tokens"], "tokens", given.train_tokens_per_second, given.start_seconds),
        "evaluation": (values["evaluation_tokens"], "tokens", evaluating, 0.0),
    }
    found = {}
    for stage, (amount, things, rate, start) in throughputs.items():
        if rate:
            how = f"{_number(amount)} {things} / {_number(rate)} a second"
            found[stage] = (amount / rate + start) / 3600, f"({how} + {start:.0f} s to start)" if start else how
    return found


def _sums(recipe: Recipe, given: Given, hours: dict[str, float]) -> Iterator[Line]:
    parallel, ranks = recipe.generation.tensor_parallel, recipe.learning.ranks
    made, evaluated = hours["generation"] * parallel, hours["evaluation"] * parallel
    learned, rounds = hours["learning"] * ranks, recipe.rounds
    in_all = rounds * (made + evaluated + learned) + evaluated
    terms = " + ".join(map(_number, (made, evaluated, learned)))
    how = f"{_count(rounds, 'round')} x ({terms}) + {_number(evaluated)} for the start's evaluation"
    yield Line("time", "run_gpu_hours", "card hours of the run", in_all, how, "hours")
    engines, judging = max(1, (given.gpus or ranks) // parallel), hours.get("verification", 0.0)
    clock = (hours["generation"] + hours["evaluation"]) / engines + judging + hours["learning"]
    how = f"({_number(hours['generation'])} + {_number(hours['evaluation'])}) / {_count(engines, 'engine')}"
    how += f" + {_number(judging)} verification + {_number(hours['learning'])} learning"
    yield Line("time", "round_hours", "a round by the clock", clock, how, "hours")


def _engine(recipe: Recipe, shape: Shape, given: Given) -> Iterator[Line]:
    settings = recipe.generation
    item, parallel = ITEM[settings.dtype], settings.tensor_parallel
    cache, weights = shape.cache(item), shape.parameters * item
    over = f", over {parallel} cards" if parallel > 1 else ""
    yield Line("engine", "engine_weights", "weights", weights, f"{item} x P{over}", "bytes")
    how = f"2 x {shape.layers} layers x {shape.key:,} x {item} bytes"
    yield Line("engine", "cache_token", "keys and values a token", cache, how, "bytes")
    longest, evaluated = settings.max_model_len, recipe.for_evaluation().max_model_len
    yield Line("engine", "cache_sequence", "of the longest rollout", cache * longest, f"{longest:,} tokens", "bytes")
    if evaluated != longest:
        how = f"{evaluated:,} tokens"
        yield Line("engine", "cache_evaluation", "of the longest evaluation", cache * evaluated, how, "bytes")
    if given.gpu_memory is None:
        room = settings.kv_cache_gib * GIB
        how = "generation.kv_cache_gib, of an engine on a CPU; give --gpu-memory for cards"
    else:
        # What vLLM keeps free for its largest step: the MLP's two products and hidden states, logits in float32 twice.
        batched, width = max(8192, evaluated + 64), shape.mlp + parallel * shape.hidden
        scratch = 2 * batched * width * item + 2 * 4 * settings.max_num_seqs * shape.vocabulary
        how = f"2 x {batched:,} tokens x {width:,} x {item} + 8 x {settings.max_num_seqs} x {shape.vocabulary:,} logits"
        yield Line("engine", "engine_scratch", "a step's activations, roughly", scratch, how, "bytes")
        room = parallel * given.gpu_memory * GIB * settings.gpu_memory_utilization - weights - scratch
        how = f"{parallel} x {given.gpu_memory:g} GiB x {settings.gpu_memory_utilization:g} - weights - activations"
    yield Line("engine", "cache_room", "room for keys and values", max(0.0, room), how, "bytes")
    fit, how = max(0, int(room // (cache * longest))), f"room / {show_bytes(cache * longest)}"
    yield Line("engine", "fit_longest", "longest rollouts that fit at once", fit, how)
    if given.mean_tokens:
        fit, how = max(0, int(room // (cache * given.mean_tokens))), f"room / {_number(given.mean_tokens)} tokens"
        yield Line("engine", "fit_mean", "mean completions that fit at once", fit, how)


def _disk(recipe: Recipe, shape: Shape, given: Given, values: dict[str, float]) -> Iterator[Line]:
    settings, rounds = recipe.learning, recipe.rounds
    tokens, completions, item = values["tokens"], values["completions"], ITEM[settings.dtype]
    rollouts = tokens * given.bytes_per_token + completions * BYTES_PER_ROLLOUT
    how = f"{_number(tokens)} tokens x {given.bytes_per_token:.3g} + {completions:,.0f} rollouts x {BYTES_PER_ROLLOUT}"
    yield Line("disk", "rollout_bytes", "rollouts of a round", rollouts, how, "bytes")
    verdicts = completions * BYTES_PER_VERDICT
    how = f"{completions:,.0f} x {BYTES_PER_VERDICT}"
    yield Line("disk", "verdict_bytes", "verdicts of a round", verdicts, how, "bytes")
    reference = 0.0
    if settings.behaviour == "recomputed":
        reference, how = tokens * BYTES_PER_REFERENCE, f"{_number(tokens)} tokens x {BYTES_PER_REFERENCE}"
        yield Line("disk", "reference_bytes", "recomputed log-probabilities", reference, how, "bytes")
    snapshot = shape.parameters * item
    yield Line("disk", "snapshot_bytes", "a snapshot", snapshot, f"{item} x P; the tokenizer comes on top", "bytes")
    learned, whose = shape.parameters, "P"
    if settings.lora_rank:
        learned, whose = shape.adapters(settings.lora_rank), "the adapters"
    # Float32 masters of what the snapshot rounds, or the adapters that it holds merged; Adam's two moments.
    parts = [(4, "weights")] * (item == 2 or settings.lora_rank > 0) + [(8, "moments")] * settings.keep_optimizer
    state, kept = sum(size for size, _ in parts) * learned, min(2, rounds) if parts else 0
    if kept:
        how = f"({' + '.join(str(size) for size, _ in parts)}) x {whose}: float32 {' and '.join(p for _, p in parts)}"
        yield Line("disk", "state_bytes", "kept for the next round", state, how, "bytes")
    moments = 12 if runs_as(settings) else 8
    checkpoints = 2 * (item + moments) * learned if settings.checkpoint_every else 0
    if checkpoints:
        how = f"2 x ({item} + {moments}) x {whose}, the old one and the new one"
        yield Line("disk", "checkpoint_bytes", "checkpoints, while learning", checkpoints, how, "bytes")
    shared = 2 * (rollouts + verdicts)
    in_all = rounds * (shared + reference + snapshot) + snapshot + kept * state + checkpoints
    each = f"2 x (rollouts + verdicts), once to share,{' reference,' if reference else ''} snapshot"
    how = f"{_count(rounds, 'round')} x ({each})"
    how += f" + the start{f' + {kept} kept' if kept else ''}{' + checkpoints' if checkpoints else ''}"
    yield Line("disk", "run_bytes", "the run at most", in_all, how, "bytes")
