"""`python -m trainer.rehearsal`: two optimizer steps at the longest length, on random tokens, before there is data.

The recipe's ranks, ZeRO stage, offload, dtype and attention are used, through the recipe's launcher, and all that comes
before a first step is done, so what would stop the learner after hours of generation stops it now.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import resource
import shutil
import time
from pathlib import Path
from typing import Any

import psutil

from pipeline.errors import OaplError
from pipeline.recipe import Recipe
from trainer import launching

PROMPT = 16
"""Tokens of a prompt: next to nothing, so that next to all tokens are learned from."""
STEPS = 2
"""The first allocates what the optimizer keeps; the second is what all others will be like."""
UNBOUNDED = 1e9
"""Nats: random tokens have log-probabilities that nobody reported."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m trainer.rehearsal", description=__doc__)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for what was measured")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    folder = arguments.out.with_suffix(".rehearsal")  # where all nodes see it
    try:
        from pipeline.planning.preflight import cure_of
        from pipeline.policies import snapshots
        from pipeline.recipe import load_recipe

        recipe = load_recipe(arguments.recipe)
        snapshots.load_record(arguments.policy)
        head = "RANK" not in os.environ and "OAPL_NODE" not in os.environ
        if head:
            shutil.rmtree(folder, ignore_errors=True)
            write_data(folder / "rollouts", recipe, arguments.policy)
    except OaplError as error:
        launching.tell(error)
    work = lambda: _rehearse(recipe, arguments.policy, folder, arguments.out)  # noqa: E731
    try:
        launching.run("trainer.rehearsal", recipe.learning, work, lambda: cure_of(recipe, arguments.policy))
    finally:
        if head:
            shutil.rmtree(folder, ignore_errors=True)


def sequences(recipe: Recipe) -> int:
    """Completions of an optimizer step here: those that fill a pass of each team of ranks."""
    settings = recipe.learning
    budget = settings.micro_batch_tokens * settings.sequence_parallel
    return settings.ranks // settings.sequence_parallel * max(1, budget // recipe.generation.max_model_len)


def for_rehearsal(recipe: Recipe) -> Recipe:
    """The recipe with what matters to memory left as it is, and what random data has no use for turned off."""
    changes: dict[str, Any] = {"batch_size": sequences(recipe), "epochs": 1, "checkpoint_every": 0}
    changes |= {"replay_rounds": 0, "verifier_version": None, "drop_uniform_groups": False, "tensorboard": False}
    changes |= {"behaviour": "engine", "importance_cap": None, "keep_optimizer": False, "max_logprob_gap": UNBOUNDED}
    changes |= {"max_residual_gap": None}
    return recipe.model_copy(update={"learning": recipe.learning.model_copy(update=changes)})


def write_data(place: Path, recipe: Recipe, policy: Path) -> None:
    """Rollouts of random tokens, each as long as the recipe allows, judged right and wrong in turn."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline.policies import snapshots
    from pipeline.rollouts.schema import VERDICTS, Rollout, rollout_id
    from pipeline.rollouts.store import Provenance, RolloutWriter

    record = snapshots.load_record(policy)
    words, longest = _vocabulary(policy), max(PROMPT + 2, recipe.generation.max_model_len)
    origin = Provenance(
        snapshot_id=record.snapshot_id,
        snapshot_sha256=record.sha256,
        snapshot_step=record.step,
        round=0,
        sampling={"temperature": recipe.generation.temperature},
        logprobs_mode="random",
        engine="rehearsal",
        engine_version="0",
        tokenizer_sha256=record.tokenizer_sha256,
        chat_template_sha256=record.chat_template_sha256,
        code_version="rehearsal",
        prompts_sha256="",
    )
    rng, verdicts = random.Random(recipe.seed), []
    with RolloutWriter(place, origin, samples=1, shard_rows=64) as writer:
        for number in range(STEPS * sequences(recipe)):
            name = rollout_id(record.snapshot_id, 0, f"{number:016x}", 0, number)
            prompt, made = ([rng.randrange(words) for _ in range(n)] for n in (PROMPT, longest - PROMPT))
            sampled = [-math.log(words)] * len(made)
            writer.add_group(
                [
                    Rollout(
                        name, 0, record.snapshot_id, record.step, f"{number:016x}", 0, prompt, made, sampled, "",
                        "length", number,
                    )
                ]
            )  # fmt: skip
            verdict = {"rollout_id": name, "verifier": "rehearsal", "verifier_version": "1", "status": "correct"}
            verdicts.append(verdict | {"reward": float(number % 2), "detail": "", "wall_ms": 0.0, "isolation": "none"})
    (place / "verdicts").mkdir()
    pq.write_table(pa.Table.from_pylist(verdicts, VERDICTS), place / "verdicts" / "rehearsal-1.parquet")


def _vocabulary(policy: Path) -> int:
    tree = json.loads((policy / "config.json").read_text(encoding="utf-8"))
    return int(tree.get("vocab_size") or tree.get("text_config", {}).get("vocab_size") or 256)


def _rehearse(recipe: Recipe, policy: Path, folder: Path, out: Path) -> None:
    import deepspeed
    import torch
    import torch.distributed as dist

    from pipeline.rollouts.locate import locate
    from pipeline.storage.durable import write_durably
    from trainer.learner import rehearse
    from trainer.ranks import patient
    from trainer.work import Round

    started = time.monotonic()
    before = psutil.Process().memory_info().rss  # Python and its libraries, of which a plan knows nothing
    deepspeed.init_distributed(launching.backend(), verbose=False)
    log = folder / "out" / "learning.jsonl"
    rehearse(Round(for_rehearsal(recipe), locate(folder / "rollouts"), policy, folder / "out", log, 0))
    on_cards = torch.cuda.is_available()
    peak = torch.cuda.max_memory_reserved() if on_cards else _peak_of_the_process() - before
    peaks = [0] * dist.get_world_size()
    dist.all_gather_object(peaks, peak, group=patient())
    dist.destroy_process_group()
    if int(os.environ["RANK"]) == 0:
        *_, last = (json.loads(line) for line in log.read_text(encoding="utf-8").splitlines())
        told = {
            "seconds": round(time.monotonic() - started, 1),
            "step_seconds": last["seconds"],
            "tokens_per_second": round(last["tokens"] / max(1e-9, last["seconds"]), 1),
            "longest": recipe.generation.max_model_len,
            "peak_bytes": max(peaks),
            "device": torch.cuda.get_device_name() if on_cards else "cpu",
        }
        write_durably(out, (json.dumps(told) + "\n").encode())


def _peak_of_the_process() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
