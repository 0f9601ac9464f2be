"""An engine of no model, for tests of what drives one."""

from __future__ import annotations

from collections import Counter

from pipeline.generation.engine import Completion, Request


class FakeEngine:
    """Completes requests in an order of its own: each takes as many steps as its seed says."""

    name, version, logprobs_mode = "fake", "1", "processed_logprobs"

    def __init__(self) -> None:
        self.running: list[tuple[int, Request]] = []
        self.seen: Counter[str] = Counter()
        self.widest = 0
        self.closed = False

    def submit(self, request: Request) -> None:
        self.seen[request.key] += 1
        self.running.append((request.seed % 7 + 1, request))
        self.widest = max(self.widest, len(self.running))

    def step(self) -> list[Completion]:
        done = [request for left, request in self.running if left == 1]
        self.running = [(left - 1, request) for left, request in self.running if left > 1]
        return [Completion(r.key, [4, 5, r.seed % 50 + 3], [-0.5, -0.25, -1.0], "stop") for r in done]

    def close(self) -> None:
        self.closed = True
