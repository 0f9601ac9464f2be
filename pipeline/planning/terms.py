"""The words that a plan is told in: what is given, the lines it comes to, a rank's memory."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pipeline.policies.shapes import Shape

BYTES_PER_TOKEN = 5.3
"""Bytes a completion token takes on the disk: id 0.96, log-probability 3.42, text 0.90. Source: benchmarks/store."""


@dataclass(frozen=True, slots=True)
class Given:
    """What a plan needs beside the recipe; null: unknown, and what hangs on it is left out or bounded."""

    mean_tokens: float | None = None
    """Tokens of a completion in training; null: generation.max_tokens, the most there can be."""
    evaluation_tokens: float | None = None
    """The same in evaluation; null: as in training, or the most there can be."""
    uniform: float = 0.0
    """Share of groups whose rewards are all equal."""
    tokens_per_second: float | None = None
    """Completion tokens of one engine (all its tensor_parallel cards)."""
    evaluation_tokens_per_second: float | None = None
    """The same in an evaluation, verdicts and start included; null: as in generation."""
    train_tokens_per_second: float | None = None
    """Completion tokens learned from, all ranks together."""
    verdicts_per_second: float | None = None
    start_seconds: float = 0.0
    """What a round of learning takes beside its steps."""
    bytes_per_token: float = BYTES_PER_TOKEN
    gpus: int | None = None
    """Cards there are; null: learning.ranks."""
    gpu_memory: float | None = None
    """GiB of one card; null: what fits is not judged."""
    source: str = ""
    """Where the measured numbers are from."""


@dataclass(frozen=True, slots=True)
class Line:
    part: str
    """Which table it stands in: model, tokens, time, engine, disk."""
    key: str
    """Its name for programs."""
    name: str
    value: float
    how: str
    """Factors or formula, in numbers."""
    unit: str = ""
    """bytes (shown in KiB, MiB, GiB or TiB), hours, PFLOP, or nothing."""


@dataclass(frozen=True, slots=True)
class Plan:
    recipe: str
    shape: Shape
    lines: list[Line]
    memory: list[Memory]
    """Of stage 0, 1, 2 and 3, with the recipe's ranks and offload."""
    memory_formulas: dict[str, str]
    stage: int
    """The stage that the recipe's learner runs as."""
    checkpointing: bool
    pass_tokens: int
    advice: list[str]

    def value(self, key: str) -> float:
        return next(line.value for line in self.lines if line.key == key)

    def as_dict(self) -> dict[str, Any]:
        memory = [
            {**asdict(stage), "total": stage.total(False), "total_checkpointed": stage.total(True)}
            for stage in self.memory
        ]
        return {
            "recipe": self.recipe,
            "model": {**asdict(self.shape), "parameters": self.shape.parameters},
            "lines": [asdict(line) for line in self.lines],
            "memory": memory,
            "memory_formulas": self.memory_formulas,
            "stage": self.stage,
            "checkpointing": self.checkpointing,
            "advice": self.advice,
        }


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one rank of the learner under one ZeRO stage."""

    stage: int
    weights: float
    gradients: float
    optimizer: float
    """AdamW's two moments, and float32 masters where the weights are not the masters."""
    gathered: float
    """Stage 3: weights that are whole for the time being."""
    bucket: float
    """DeepSpeed's buffer to reduce gradients in."""
    logits: float
    head_gradient: float
    """Of the output matrix, summed in float32 in one pass."""
    activations: float
    activations_checkpointed: float
    """What layers are computed from again."""
    layer: float
    """Checkpointed: activations of the layer at work, when logits are gone."""
    step: float
    """Gradients once more in float32, while the optimizer steps and activations are gone."""
    host: float
    """Bytes of the host's memory for all ranks."""

    def total(self, checkpointing: bool) -> float:
        held = self.weights + self.gradients + self.optimizer + self.gathered + self.bucket
        head = self.logits + self.head_gradient
        if checkpointing:
            return held + max(self.activations_checkpointed + max(self.layer, head), self.step)
        return held + max(self.activations + head, self.step)
