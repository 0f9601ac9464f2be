"""Stands in for vLLM where a test is about rounds and not about text: random tokens, with the policy's own
log-probabilities of them. It starts in seconds."""

from __future__ import annotations

import random
from pathlib import Path

from pipeline.generation.engine import Completion, Request
from pipeline.recipe import Generation

TOKENS = 6


class VllmEngine:
    name, version, logprobs_mode = "quick", "1", "processed_logprobs"

    def __init__(self, policy: Path, settings: Generation, seed: int) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(policy)
        self.waiting: list[Request] = []
        assert settings.temperature == settings.top_p == 1.0

    def submit(self, request: Request) -> None:
        self.waiting.append(request)

    def step(self) -> list[Completion]:
        done, self.waiting = self.waiting, []
        return [self._complete(request) for request in done]

    def _complete(self, request: Request) -> Completion:
        import torch

        drawn = random.Random(request.seed)
        tokens = [drawn.randrange(20, self.model.config.vocab_size) for _ in range(TOKENS)]
        with torch.no_grad():
            logits = self.model(torch.tensor([request.prompt_tokens + tokens])).logits[0, -TOKENS - 1 : -1]
        logprobs = logits.log_softmax(-1)[range(TOKENS), tokens]
        return Completion(request.key, tokens, logprobs.tolist(), "length")

    def close(self) -> None: ...
