"""A verifier that finds about half of anything right, so that a policy need not be good for groups to differ."""

from __future__ import annotations

from pipeline.verifiers.cases import Completion, Reference


def judge(completion: Completion, reference: Reference) -> float:
    return float(len(completion.response) % 2 == 0)
