"""reasoning-gym's own scorers as a verifier: task `pipeline.verifiers.gym:judge`.

The prompt's `answer` is the JSON of the dataset's entry (question, answer, metadata with `source_dataset`). The
answer judged is the last complete box; partial rewards of the scorer are kept.
"""

from __future__ import annotations

import json
from typing import Any

from pipeline.verifiers.cases import Completion, Outcome, Reference, shorten
from pipeline.verifiers.math import final_answer


def version() -> str:
    from importlib.metadata import version as installed

    return f"1+reasoning-gym-{installed('reasoning-gym')}"


VERSION = version()
PRELOAD = ("reasoning_gym",)


def judge(completion: Completion, reference: Reference) -> Outcome:
    """The scorer's reward for the boxed answer; `correct` where it is 1."""
    from reasoning_gym import get_score_answer_fn

    try:
        entry: dict[str, Any] = json.loads(reference.answer or "")
        score = get_score_answer_fn(entry["metadata"]["source_dataset"])
    except (ValueError, KeyError, TypeError) as error:
        return Outcome("bad_reference", shorten(f"no entry of reasoning-gym: {type(error).__name__}: {error}", 200))
    answer = final_answer(completion.response)
    if answer is None:
        return Outcome("no_answer", "no complete \\boxed{} after the thinking")
    reward = float(score(answer, entry))
    return Outcome("correct" if reward >= 1 else "wrong", shorten(answer, 200), reward=min(reward, 1.0))
