"""Rollouts made from nothing, for the tests of this folder: deterministic, of any size."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.prompts.files import Prompt, write_prompts
from pipeline.rollouts import schema
from pipeline.rollouts.locate import Located, locate
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


def prompt(number: int) -> Prompt:
    task, answer, tests = (
        ("math", str(number), None) if number % 3 else ("code", None, '{"inputs": ["1"], "outputs": ["1"]}')
    )
    messages = (("system", "Think."), ("user", f"question {number}"))
    return Prompt(prompt_name(number), task, f"source-{number % 2}", "train", messages, answer, tests)


STATUS_OF = ("correct", "wrong", "no_answer", "bad_reference")
REWARDS = {"correct": 1.0, "wrong": 0.0, "no_answer": 0.0, "bad_reference": None}


def verdict(number: int, rollout: Rollout) -> dict[str, object]:
    """Prompts 0, 4, 8, ... are all right, 1, 5, ... all wrong; the rest are mixed, some of them unscorable."""
    status = STATUS_OF[number % 4] if number % 4 < 2 else STATUS_OF[(rollout.sample + number) % 4]
    return {
        "rollout_id": rollout.rollout_id,
        "verifier": "math",
        "verifier_version": "1.0",
        "status": status,
        "reward": REWARDS[status],
        "detail": f"{status} of prompt {number}",
        "wall_ms": 1.5,
        "isolation": "none",
    }


def write_verdicts(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema.VERDICTS), path)


def dataset(folder: Path, count: int = 20, shard_rows: int = 16, **shape: int) -> Located:
    """What `oapl generate --out` leaves, scored: rollouts, prompts and verdicts of `count` groups."""
    write(folder, count, shard_rows, **shape)
    write_prompts(folder / "prompts.parquet", (prompt(number) for number in range(count)))
    rows = [verdict(number, rollout) for number, rows in enumerate(groups(count, **shape)) for rollout in rows]
    write_verdicts(folder / "verdicts" / "math-1.0.parquet", rows)
    return locate(folder)
