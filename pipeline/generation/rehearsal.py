"""`python -m pipeline.generation.rehearsal`: the engine started under a recipe's settings, and some tokens made.

vLLM measures at its start whether a step of its largest batch and one sequence of full length fit; the tokens show that
it samples.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from pipeline.ending import leave
from pipeline.errors import OaplError, WorkError
from pipeline.generation.engine import Request
from pipeline.generation.vllm_engine import VllmEngine
from pipeline.recipe import Recipe, load_recipe
from pipeline.storage.durable import write_durably

TOKENS, REQUESTS = 8, 4
MOST = 400
"""Letters of vLLM's own words in an error's line."""


def rehearse(recipe: Recipe, policy: Path) -> dict[str, object]:
    """Starts the engine at the greatest length that the recipe's stages ask of it. Raises what `VllmEngine` raises."""
    longest = recipe.for_evaluation()
    settings = longest.model_copy(update={"max_tokens": min(TOKENS, longest.max_tokens)})
    started = time.monotonic()
    engine = VllmEngine(policy, settings, recipe.seed)
    ready = time.monotonic()
    try:
        tokens = _sample(engine)
    except Exception as error:
        raise WorkError(f"vLLM starts with {policy} and can't sample: {' '.join(str(error).split())[:MOST]}") from error
    return {"seconds": round(ready - started, 1), "longest": settings.max_model_len, "tokens": tokens}


def _sample(engine: VllmEngine) -> int:
    for number in range(REQUESTS):
        engine.submit(Request(str(number), [1, 2, 3, 4], number))
    left, tokens = REQUESTS, 0
    while left:
        for made in engine.step():
            left, tokens = left - 1, tokens + len(made.tokens)
    return tokens


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m pipeline.generation.rehearsal", description=__doc__)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for what was measured")
    arguments = parser.parse_args()
    try:
        told = rehearse(load_recipe(arguments.recipe), arguments.policy)
    except OaplError as error:
        sys.stderr.write(f"oapl: {error}\n")
        sys.exit(error.exit_code)
    write_durably(arguments.out, (json.dumps(told) + "\n").encode())
    leave()


if __name__ == "__main__":
    main()
