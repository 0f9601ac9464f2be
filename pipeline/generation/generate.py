"""Rollouts from a frozen snapshot: requests are kept flowing, each group is stored as it completes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.generation.batch import ContinuousBatch, Work
from pipeline.generation.engine import Engine
from pipeline.generation.on_ray import generate_on_ray
from pipeline.generation.provenance import provenance
from pipeline.policies import snapshots
from pipeline.progress import Progress
from pipeline.prompts.files import Prompt
from pipeline.rollouts.store import RolloutWriter


@dataclass(slots=True)
class Totals:
    """What this call made; what was committed before it is not counted."""

    groups: int = 0
    completions: int = 0
    tokens: int = 0
    seconds: float = 0.0
    skipped_groups: int = 0
    """Groups that were in the manifest already."""


def generate(work: Work, prompts: Iterable[Prompt], out: Path | str, start_engine: Callable[[], Engine]) -> Totals:
    """Generates each prompt's group that `out` (a folder or a URL) lacks yet, and commits groups shard by shard.

    `prompts`, each with an id of its own, are gone through twice: a list or a PromptFile, no generator. The engine is
    started only where something is missing; with `engine: ray` each replica starts one, so that `start_engine` must
    be picklable. Raises RequestError where a prompt does not fit the model's length, or where `out` was begun under
    other settings.
    """
    snapshot = snapshots.load_record(work.policy)
    settings = work.settings
    started = time.monotonic()
    ids = [prompt.prompt_id for prompt in prompts]
    origin = provenance(work, snapshot, ids)
    on_ray = settings.engine == "ray"
    with RolloutWriter(out, origin, samples=settings.samples, shard_rows=settings.shard_rows, shared=on_ray) as writer:
        there = sum(prompt_id in writer.committed for prompt_id in ids)
        wanted = len(ids) - there
        if not wanted:
            return Totals(skipped_groups=there)
        before = writer.manifest
        missing = (prompt for prompt in prompts if prompt.prompt_id not in writer.committed)
        progress = Progress("generate", wanted * settings.samples, "completions")
        try:
            if on_ray:
                generate_on_ray(work, start_engine, missing, wanted, writer, progress)
            else:
                _generate_here(work, snapshot, start_engine, missing, writer, progress)
        finally:
            progress.close()
    made = writer.manifest
    return Totals(
        groups=made.groups - before.groups,
        completions=made.rows - before.rows,
        tokens=made.tokens - before.tokens,
        seconds=time.monotonic() - started,
        skipped_groups=there,
    )


def _generate_here(
    work: Work,
    snapshot: snapshots.Snapshot,
    start_engine: Callable[[], Engine],
    prompts: Iterator[Prompt],
    writer: RolloutWriter,
    progress: Progress,
) -> None:
    """At most two engines' worth of requests are in flight, whatever the number of prompts."""
    limit = max(2 * work.settings.max_num_seqs, work.settings.samples)
    groups = ContinuousBatch(work, snapshot, start_engine, progress.add, limit)
    try:
        while True:
            while groups.room and (prompt := next(prompts, None)) is not None:
                groups.add(prompt)
            if not groups.in_flight:
                return
            for group in groups.step():
                writer.add_group(group)
    finally:
        groups.close()
