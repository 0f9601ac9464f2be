"""Prompts in, whole groups of rollouts out: an engine kept full, here or in a replica."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import RequestError
from pipeline.generation.engine import Completion, Engine, Request
from pipeline.policies import snapshots
from pipeline.prompts.files import Prompt
from pipeline.recipe import Generation, Recipe
from pipeline.rollouts.schema import Rollout, completion_seed, rollout_id


@dataclass(frozen=True, slots=True)
class Work:
    """What one round of generation is asked to do."""

    policy: Path
    settings: Generation
    round: int
    seed: int
    recipe: Recipe | None = None
    origin: str | None = None
    """The URL that the policy was brought from, so that other machines bring it, too."""


@dataclass(slots=True)
class _Group:
    prompt: Prompt
    prompt_tokens: list[int]
    done: list[Completion | None]
    left: int


class ContinuousBatch:
    """The continuous batch: it is topped up as completions leave, and never drained first.

    Add prompts while there is `room`, and step. At most `limit` requests and a group are in the engine, whatever
    the number of prompts. `count(completions, tokens)` is called for each completion.
    """

    def __init__(
        self,
        work: Work,
        snapshot: snapshots.Snapshot,
        start_engine: Callable[[], Engine],
        count: Callable[[int, int], None],
        limit: int,
    ) -> None:
        from transformers import AutoTokenizer

        self._work, self._snapshot, self._count, self._limit = work, snapshot, count, limit
        self._tokenizer: Any = AutoTokenizer.from_pretrained(work.policy)
        self._open: dict[str, _Group] = {}
        self._start_engine = start_engine
        self._engine: Engine | None = None
        self.in_flight = 0
        """Requests that are not completed yet."""

    def start(self) -> None:
        """Starts the engine, which the first prompt does otherwise."""
        self._engine = self._engine or self._start_engine()

    @property
    def room(self) -> bool:
        return self.in_flight < self._limit

    def add(self, prompt: Prompt) -> None:
        """Submits a prompt's whole group. Raises RequestError for a prompt that the model has no room for."""
        settings = self._work.settings
        tokens = list(self._tokenizer.apply_chat_template(prompt.chat(), add_generation_prompt=True, return_dict=False))
        if len(tokens) >= settings.max_model_len:
            raise RequestError(
                f"prompt {prompt.prompt_id} ({prompt.source}) has {len(tokens)} tokens, and "
                f"generation.max_model_len is {settings.max_model_len}; raise it or leave the prompt out"
            )
        self.start()
        assert self._engine is not None
        self._open[prompt.prompt_id] = _Group(prompt, tokens, [None] * settings.samples, settings.samples)
        for sample in range(settings.samples):
            self._engine.submit(Request(f"{prompt.prompt_id}/{sample}", tokens, self._seed(prompt.prompt_id, sample)))
        self.in_flight += settings.samples

    def step(self) -> list[list[Rollout]]:
        """One decoding step; the groups that became whole in it."""
        assert self._engine is not None
        whole = []
        for completion in self._engine.step():
            self.in_flight -= 1
            self._count(1, len(completion.tokens))
            prompt_id, _, number = completion.key.rpartition("/")
            group = self._open[prompt_id]
            group.done[int(number)] = completion
            group.left -= 1
            if not group.left:
                del self._open[prompt_id]
                whole.append([self._rollout(group, made) for made in group.done if made is not None])
        return whole

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()

    def _seed(self, prompt_id: str, sample: int) -> int:
        return completion_seed(self._work.seed, self._work.round, prompt_id, sample)

    def _rollout(self, group: _Group, completion: Completion) -> Rollout:
        sample = int(completion.key.rpartition("/")[2])
        prompt_id, round = group.prompt.prompt_id, self._work.round
        seed = self._seed(prompt_id, sample)
        return Rollout(
            rollout_id=rollout_id(self._snapshot.snapshot_id, round, prompt_id, sample, seed),
            round=round,
            snapshot_id=self._snapshot.snapshot_id,
            snapshot_step=self._snapshot.step,
            prompt_id=prompt_id,
            sample=sample,
            prompt_tokens=group.prompt_tokens,
            completion_tokens=completion.tokens,
            logprobs=completion.logprobs,
            completion=self._tokenizer.decode(completion.tokens, skip_special_tokens=True),
            finish_reason=completion.finish_reason,
            seed=seed,
        )
