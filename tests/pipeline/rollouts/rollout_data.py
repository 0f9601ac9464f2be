"""Rollouts made from nothing, for the tests of this folder: deterministic, of any size."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from pipeline.rollouts import schema
from pipeline.rollouts.schema import Rollout
from pipeline.rollouts.store import Manifest, Provenance, RolloutWriter, read_manifest

SNAPSHOT = "step000000-0badcafe"


def provenance(**changes: object) -> Provenance:
    values: dict[str, object] = {
        "snapshot_id": SNAPSHOT,
        "snapshot_sha256": "a" * 64,
        "snapshot_step": 0,
        "round": 0,
        "sampling": {"samples": 4, "temperature": 1.0, "top_p": 0.95, "top_k": 0, "max_tokens": 32, "seed": 7},
        "logprobs_mode": "processed_logprobs",
        "engine": "fake",
        "engine_version": "1.0",
        "tokenizer_sha256": "b" * 64,
        "chat_template_sha256": "c" * 64,
        "recipe": {"name": "small", "seed": 7},
        "code_version": "0.1.0",
        "prompts_sha256": "d" * 64,
    }
    return Provenance.model_validate(values | changes)


def prompt_name(number: int) -> str:
    return f"{number * 2654435761 % 2**64:016x}"


def group(
    number: int, samples: int = 4, tokens: int = 12, round: int = 0, snapshot_id: str = SNAPSHOT
) -> list[Rollout]:
    """The group of prompt `number`: always the same, lengths 1 .. 2 * tokens."""
    prompt = prompt_name(number)
    rows = []
    for sample in range(samples):
        dice = random.Random(f"{prompt}-{sample}-{round}-{snapshot_id}")
        length = dice.randint(1, 2 * tokens)
        completion = [dice.randrange(48, 123) for _ in range(length)]
        seed = schema.completion_seed(7, round, prompt, sample)
        rows.append(
            Rollout(
                rollout_id=schema.rollout_id(snapshot_id, round, prompt, sample, seed),
                round=round,
                snapshot_id=snapshot_id,
                snapshot_step=50 * round,
                prompt_id=prompt,
                sample=sample,
                prompt_tokens=[ord(letter) for letter in f"question {number}"],
                completion_tokens=completion,
                logprobs=[-dice.expovariate(2.0) for _ in range(length)],
                completion="".join(map(chr, completion)),
                finish_reason="stop" if length < 2 * tokens else "length",
                seed=seed,
            )
        )
    return rows


def groups(count: int, **shape: int) -> Iterator[list[Rollout]]:
    return (group(number, **shape) for number in range(count))


def write(folder: Path, count: int = 20, shard_rows: int = 16, **shape: int) -> Manifest:
    """A dataset of `count` groups in `folder`."""
    samples = shape.get("samples", 4)
    with RolloutWriter(
        folder, provenance(round=shape.get("round", 0)), samples=samples, shard_rows=shard_rows
    ) as writer:
        for rows in groups(count, **shape):
            writer.add_group(rows)
    return read_manifest(folder)
