"""What a run takes of prompts: its set, train and held out, and the prompts of each round."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Literal

from pipeline.errors import RequestError
from pipeline.policies.fetch import fetch_policy
from pipeline.prompts import tiny
from pipeline.prompts.fetch import fetch_prompts
from pipeline.prompts.files import Prompt, iter_prompts, make_prompt, read_prompts, write_prompts
from pipeline.recipe import Recipe
from pipeline.storage.places import is_url


def build_prompt_set(recipe: Recipe, out: Path) -> dict[str, int]:
    """Writes the run's prompt set, train and held out, and returns the count of each split.

    No prompt is in both: held-out prompts are taken first, and a training prompt with the
    content or the messages of a held-out one is left out. With `prompts.max_tokens`, too long training prompts are
    left out, and counted as `too_long`.
    """
    settings = recipe.prompts
    train = _source(settings.train, "train", recipe)
    if settings.heldout is None:
        train = _shuffled(train, recipe.seed)
        if len(train) <= settings.heldout_count:
            raise RequestError(
                f"{settings.train}: {len(train)} prompts are not enough to hold out {settings.heldout_count}; "
                "lower prompts.heldout_count"
            )
        heldout, train = train[: settings.heldout_count], train[settings.heldout_count :]
    else:
        heldout = _source(settings.heldout, "heldout", recipe)[: settings.heldout_count]
    heldout = [replace(prompt, split="heldout") for prompt in heldout]
    taken = {prompt.prompt_id for prompt in heldout} | {repr(prompt.messages) for prompt in heldout}
    train = [replace(p, split="train") for p in train if p.prompt_id not in taken and repr(p.messages) not in taken]
    if not train:
        raise RequestError(f"{settings.train}: no training prompt is left beside the held-out ones")
    counts = {"heldout": len(heldout)}
    if settings.max_tokens is not None:
        short = _short_enough(train, settings.max_tokens, recipe.policy.model)
        if not short:
            raise RequestError(f"{settings.train}: no training prompt has {settings.max_tokens} tokens or fewer")
        counts["too_long"] = len(train) - len(short)
        train = short
    write_prompts(out, [*train, *heldout])
    return {"train": len(train), **counts}


def _short_enough(prompts: Sequence[Prompt], most: int, model: str | None) -> list[Prompt]:
    if model is None:
        raise RequestError("prompts.max_tokens needs policy.model, whose tokenizer counts; set it to null")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(fetch_policy(model) if is_url(model) else model)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RequestError(f"policy.model {model}: no tokenizer to count prompts.max_tokens with ({reason})") from None
    return [
        prompt
        for prompt in prompts
        if len(tokenizer.apply_chat_template(prompt.chat(), add_generation_prompt=True, return_dict=False)) <= most
    ]


def _source(name: str, split: Literal["train", "heldout"], recipe: Recipe) -> list[Prompt]:
    if name != "tiny":
        found = read_prompts(fetch_prompts(name))
        # A file without marks is all of the split it is named for; a marked one gives its part.
        return [prompt for prompt in found if prompt.split == split] or found
    settings = recipe.prompts
    wanted = settings.heldout_count if split == "heldout" else settings.per_round * max(recipe.rounds, 8)
    return [
        make_prompt(p.task, [("user", p.text)], answer=p.answer, tests=p.tests, source=p.source, split=split)
        for p in tiny.problems(recipe.seed, split, wanted)
    ]


def _shuffled(prompts: list[Prompt], seed: int) -> list[Prompt]:
    order = sorted(prompts, key=lambda prompt: prompt.prompt_id)
    random.Random(seed).shuffle(order)
    return order


def round_prompts(prompt_set: Path, round: int, per_round: int, seed: int) -> list[Prompt]:
    """The training prompts of one round: the next `per_round` of an endless, seeded shuffle.

    Each pass over the set is shuffled anew, so that a prompt comes back only when all others have been used.
    """
    train = [prompt for prompt in iter_prompts(prompt_set) if prompt.split == "train"]
    lap, place = divmod(round * min(per_round, len(train)), len(train))
    stream = chain.from_iterable(_shuffled(train, seed + number) for number in count(lap))
    taken: dict[str, Prompt] = {}
    for prompt in islice(stream, place, None):
        if len(taken) == min(per_round, len(train)):
            break
        taken.setdefault(prompt.prompt_id, prompt)
    return list(taken.values())
