"""The columns of a prompt that verl and the official repository share."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from pipeline.errors import RequestError
from pipeline.prompts.files import Prompt, make_prompt
from pipeline.sharing.exchange.form import CHAT, messages_of

SHARED = [
    ("data_source", pa.string()),
    ("prompt", CHAT),
    ("ability", pa.string()),
    ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
    ("extra_info", pa.struct([("split", pa.string()), ("index", pa.int64())])),
]


def prompt_of(row: dict[str, Any], where: str, task: str) -> tuple[Prompt, dict[str, Any]]:
    """A prompt of the columns that verl and the official repository share, and what else they say of it."""
    model = row.get("reward_model")
    truth = model.get("ground_truth") if isinstance(model, dict) else None
    if truth is None:
        raise RequestError(f"{where}: needs reward_model with ground_truth, by which responses are judged")
    truth = truth if isinstance(truth, str) else json.dumps(truth, ensure_ascii=False)
    messages = messages_of(row.get("prompt"), where, "prompt")
    extra = row.get("extra_info")
    extra = extra if isinstance(extra, dict) else {}
    index = extra.get("index")
    ability = row.get("ability")
    # The official generator writes "math" for code too: tests, which are JSON, give code away.
    code = task == "code" or ability == "code" or _is_tests(truth)
    prompt = make_prompt(
        "code" if code else "math",
        messages,
        answer=None if code else truth,
        tests=truth if code else None,
        source=str(row.get("data_source") or ""),
        split="heldout" if extra.get("split") in ("test", "val", "heldout") else "train",
    )
    words = {"ability": ability, "style": model.get("style"), "split": extra.get("split")}  # type: ignore[union-attr]
    extras = {key: None if value is None else str(value) for key, value in words.items()}
    return prompt, {**extras, "index": index if isinstance(index, int) else None}


def _is_tests(truth: str) -> bool:
    return truth.lstrip()[:1] in ("{", "[") and ('"input' in truth or '"test' in truth)


def shared_columns(prompt: dict[str, Any]) -> dict[str, Any]:
    truth, extras = prompt["tests"] if prompt["answer"] is None else prompt["answer"], prompt["extras"]
    return {
        "data_source": prompt["source"],
        "prompt": prompt["messages"],
        "ability": extras["ability"],
        "reward_model": {"style": extras["style"], "ground_truth": truth},
        "extra_info": {"split": extras["split"], "index": extras["index"]},
    }
