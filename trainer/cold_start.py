"""Supervised cold start of the embedded policy: mediocre on purpose, so that there is something to learn.

A fixed number of steps on traces of which a known share is wrong: the policy learns how an answer looks
and is right about as often as its traces were, while right answers stay within reach of a few samples.
"""

from __future__ import annotations

import argparse
import os
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from pipeline.policies import snapshots
from pipeline.progress import Progress
from pipeline.prompts import tiny
from pipeline.recipe import ColdStart, Recipe, load_recipe
from trainer.policy import make_model, make_tokenizer

IGNORED = -100
BUCKETED = 4
"""Batches' worth of traces that are sorted by length at a time."""


def cold_start(recipe: Recipe, out: Path) -> snapshots.Snapshot:
    """Trains the embedded policy and publishes it below `out`; the same weights for the same recipe and machine."""
    settings = recipe.policy.cold_start
    assert settings is not None
    torch.manual_seed(recipe.seed)
    texts = [
        text
        for pair in islice(tiny.traces(recipe.seed, settings.wrong_sums, settings.wrong_programs), 2000)
        for text in pair
    ]
    tokenizer = make_tokenizer(["user", "assistant", *texts], settings.vocabulary)
    model = make_model(settings, tokenizer)
    _train(model, tokenizer, settings, recipe.seed)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return snapshots.publish(out, fill, parent=None, round=None, step=0, recipe_sha256=recipe.digest())


def _train(model: Any, tokenizer: Any, settings: ColdStart, seed: int) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _linear(step, settings.steps))
    progress = Progress("cold start", settings.steps, "steps")
    for batch in islice(_batches(tokenizer, settings, seed), settings.steps):
        ids, labels = _pad(batch, tokenizer.pad_token_id)  # [batch, tokens] each
        logits = model(input_ids=ids).logits  # padding is on the right, so causal attention never sees it
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        progress.add(1, note=f"loss {loss.item():.3f}")
    progress.close()


def _batches(tokenizer: Any, settings: ColdStart, seed: int) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Endless batches of traces of like length, since padding would be a fifth of the work."""
    traces = tiny.traces(seed, settings.wrong_sums, settings.wrong_programs)
    rng = random.Random(f"{seed}/batches")
    size = settings.batch_size
    while True:
        encoded = (_encode(tokenizer, *trace) for trace in islice(traces, BUCKETED * size))
        ordered = sorted(encoded, key=lambda trace: len(trace[0]))
        batches = [ordered[first : first + size] for first in range(0, len(ordered), size)]
        rng.shuffle(batches)
        yield from batches


def _linear(step: int, steps: int) -> float:
    """Warm-up over a fiftieth of the steps, then down to nothing."""
    warmup = max(1, steps // 50)
    return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))


def _encode(tokenizer: Any, prompt: str, completion: str) -> tuple[list[int], list[int]]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    before = tokenizer(text, add_special_tokens=False)["input_ids"]
    after = [*tokenizer(completion, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return before + after, [IGNORED] * len(before) + after


def _pad(batch: list[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(len(ids) for ids, _ in batch)
    ids = [ids + [pad] * (longest - len(ids)) for ids, _ in batch]
    labels = [labels + [IGNORED] * (longest - len(labels)) for _, labels in batch]
    return torch.tensor(ids), torch.tensor(labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)))
    cold_start(load_recipe(arguments.recipe, arguments.set), arguments.out)


if __name__ == "__main__":
    main()
