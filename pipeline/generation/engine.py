"""What generation asks of an inference engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to be made."""

    key: str
    prompt_tokens: list[int]
    seed: int


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion as sampled."""

    key: str
    tokens: list[int]
    """Sampled ids, the end-of-sequence token included where there is one."""
    logprobs: list[float]
    """Nats, one a token, under the distribution sampled from (after temperature, top-p, top-k)."""
    finish_reason: str
    """`stop`, `length` or `abort`."""


class Engine(Protocol):
    """A continuous batch: requests go in at any time, completions come out as they finish."""

    name: str
    version: str
    logprobs_mode: str

    def submit(self, request: Request) -> None: ...

    def step(self) -> list[Completion]:
        """One decoding step for all that runs; what has finished in it."""
        ...

    def close(self) -> None: ...
