"""Columns of the three tables a round is made of, and what each of them means.

A consumer with only pyarrow or polars can join them::

    rollouts.join(verdicts, on="rollout_id").join(prompts, on="prompt_id")

Each field says who writes it, who reads it, and what null means. Where nothing is said of
null, the field is never null.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

SCHEMA_VERSION = 1
"""Version of all three tables. It rises when a reader of the old one would be wrong."""

FinishReason = Literal["stop", "length", "abort"]

ROLLOUTS = pa.schema(
    [
        # SHA-256 over (snapshot_id, round, prompt_id, sample, seed), 16 hex digits: an undisturbed
        # run and a resumed one write the same ids. Written by generation; the key of verdicts.
        pa.field("rollout_id", pa.string(), nullable=False),
        # The round whose frozen policy wrote the row. Read by the learner for replay.
        pa.field("round", pa.int32(), nullable=False),
        # Name of the frozen snapshot and the optimizer step it was published at. The learner's
        # lag is its own step minus this one, row by row.
        pa.field("snapshot_id", pa.string(), nullable=False),
        pa.field("snapshot_step", pa.int64(), nullable=False),
        # Content hash of the prompt (see PROMPTS). All rows of a prompt form its group.
        pa.field("prompt_id", pa.string(), nullable=False),
        # 0 .. G-1 within the group.
        pa.field("sample", pa.int32(), nullable=False),
        # What the engine was fed and what it sampled, the end-of-sequence token included.
        # These are canonical; `completion` is derived from them. Read by the learner.
        pa.field("prompt_tokens", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        pa.field("completion_tokens", pa.list_(pa.field("item", pa.int32(), nullable=False)), nullable=False),
        # Log-probability in nats of each completion token under the behaviour policy, after
        # temperature, top-p and top-k ("processed"), one a token. Null where the rollout came
        # from elsewhere as text: it must then be recomputed before learning.
        pa.field("logprobs", pa.list_(pa.field("item", pa.float32(), nullable=False)), nullable=True),
        # Decoded completion without special tokens. Read by verifiers and people.
        pa.field("completion", pa.string(), nullable=False),
        # "stop": ended by itself; "length": cut at max_tokens, so no end-of-sequence token;
        # "abort": the engine gave up on it.
        pa.field("finish_reason", pa.string(), nullable=False),
        # The engine's seed for this completion. Null where the producer did not record one.
        pa.field("seed", pa.int64(), nullable=True),
    ]
)

_MESSAGE = pa.struct([pa.field("role", pa.string(), nullable=False), pa.field("content", pa.string(), nullable=False)])

PROMPTS = pa.schema(
    [
        # SHA-256 over task, messages and reference, 16 hex digits. Written by the loader.
        pa.field("prompt_id", pa.string(), nullable=False),
        # Which verifier judges it: a key of VERIFIERS ("math", "code") or an import path.
        pa.field("task", pa.string(), nullable=False),
        # Where it came from, for statistics by source ("tiny-arithmetic", "DeepScaleR", a file's name).
        pa.field("source", pa.string(), nullable=False),
        # "train" or "heldout".
        pa.field("split", pa.string(), nullable=False),
        # Chat messages, rendered by the policy's own chat template.
        pa.field("messages", pa.list_(pa.field("item", _MESSAGE, nullable=False)), nullable=False),
        # Reference answer of a math prompt; null for code.
        pa.field("answer", pa.string(), nullable=True),
        # JSON of the tests of a code prompt; null for math.
        pa.field("tests", pa.string(), nullable=True),
    ]
)

STATUSES = ("correct", "wrong", "no_answer", "timeout", "crashed", "bad_reference", "refused")
UNSCORABLE = ("bad_reference", "refused")
"""Statuses whose reward is null: the data or the machine is at fault, not the completion."""

VERDICTS = pa.schema(
    [
        pa.field("rollout_id", pa.string(), nullable=False),
        # Name and version of the verifier that judged the row.
        pa.field("verifier", pa.string(), nullable=False),
        pa.field("verifier_version", pa.string(), nullable=False),
        # One of STATUSES.
        pa.field("status", pa.string(), nullable=False),
        # 1.0 for correct, 0.0 for wrong, no_answer, timeout and crashed (a custom verifier may
        # give partial rewards); null where unscorable, which the learner leaves out.
        pa.field("reward", pa.float32(), nullable=True),
        # Why, for a person: the extracted answer, the first failing test, the error's last line.
        pa.field("detail", pa.string(), nullable=False),
        # Wall-clock milliseconds the judgement took.
        pa.field("wall_ms", pa.float32(), nullable=False),
        # How candidate code was kept apart: "bubblewrap", "process", "none" (nothing was run).
        pa.field("isolation", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True, slots=True)
class Rollout:
    """One completion; the fields of ROLLOUTS in Python types."""

    rollout_id: str
    round: int
    snapshot_id: str
    snapshot_step: int
    prompt_id: str
    sample: int
    prompt_tokens: list[int]
    completion_tokens: list[int]
    logprobs: list[float] | None
    completion: str
    finish_reason: str
    seed: int | None

    def as_row(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ROLLOUTS.names}


def rollout_id(snapshot_id: str, round: int, prompt_id: str, sample: int, seed: int | None) -> str:
    """The key of a completion, the same whenever and wherever it is made."""
    key = f"{snapshot_id}|{round}|{prompt_id}|{sample}|{seed}"
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def completion_seed(seed: int, round: int, prompt_id: str, sample: int) -> int:
    """Sampling seed of one completion, in [0, 2**31): a function of what it is for, not of when."""
    key = f"{seed}|{round}|{prompt_id}|{sample}"
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") >> 1
