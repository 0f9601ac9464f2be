"""Rollouts in the columns of other projects, in and out.

    official   the OAPL repository's Parquet: a row a response, with the group's rewards
    verl       Parquet: a row a prompt, with a list of responses
    trl        Parquet or JSON lines: prompt, completion, prompt_ids, completion_ids, logprobs, reward
    jsonl      JSON lines with the same keys as trl

Where token ids are there they are kept; where only text is there it is tokenised again, which is recorded in the
manifest and said on the card, and log-probabilities are null: they are recomputed before learning.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import RequestError
from pipeline.prompts.files import Prompt, make_prompt, write_prompts
from pipeline.rollouts import schema
from pipeline.rollouts.locate import EXTRAS, PROMPTS, ROLLOUTS, VERDICTS, Located
from pipeline.rollouts.schema import Rollout
from pipeline.rollouts.store import Provenance, RolloutWriter, iter_batches, split_groups
from pipeline.rollouts.tables import PromptShelf, VerdictIndex
from pipeline.sharing.package import describe, new_folder
from pipeline.storage import durable

_UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Trace:
    """One completion of a foreign file, in words that all forms share."""

    prompt: Prompt
    completion: str
    reward: float | None
    prompt_ids: list[int] | None = None
    completion_ids: list[int] | None = None
    logprobs: list[float] | None = None
    finish_reason: str | None = None
    extras: dict[str, Any] | None = None
    """What the form has of a prompt and our tables have no column for; kept beside them for the way back."""


_EXTRAS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("ability", pa.string()),
        ("style", pa.string()),
        ("split", pa.string()),
        ("index", pa.int64()),
    ]
)


# --- in -----------------------------------------------------------------------------------------------------------


def import_foreign(
    source: Path, out: Path, form: str, *, tokenizer: Path | None, task: str = "math", licence: str = "unknown"
) -> dict[str, Any]:
    """Writes an exported dataset out of a foreign file; returns its numbers.

    Rows of one prompt must follow each other, as all of these projects write them: they form its group. The end-of-
    sequence token is not put back into text that is tokenised again: whether the engine sampled it is not known.
    Raises RequestError that names the row where a column is missing or of another type, where text must be tokenised
    and no `tokenizer` folder is given, and where one prompt comes in two places.
    """
    if not source.is_file():
        raise RequestError(f"{source}: no such file; give the Parquet or JSON lines file to import")
    facts = _survey(_READERS[form](source, task), source)
    encode = _encoder(tokenizer, source) if facts["retokenised"] or facts["prompts_tokenised"] else None
    digest = durable.sha256_file(source)
    origin = Provenance(
        snapshot_id=f"imported-{digest[:8]}",
        snapshot_sha256=_UNKNOWN,
        snapshot_step=0,
        round=0,
        sampling={"samples": _UNKNOWN, "temperature": _UNKNOWN, "top_p": _UNKNOWN, "top_k": _UNKNOWN},
        logprobs_mode=_UNKNOWN if facts["logprobs"] else "missing",
        engine=_UNKNOWN,
        engine_version=_UNKNOWN,
        tokenizer_sha256=_tokenizer_sha256(tokenizer),
        chat_template_sha256=_UNKNOWN,
        code_version=version("oapl"),
        prompts_sha256=_UNKNOWN,
        imported={"format": form, "source": source.name, "sha256": digest, **facts},
    )
    with new_folder(out) as folder:
        _write_groups(folder, _groups(_READERS[form](source, task), source), origin, encode)
        # The source is read once more for its prompts: tests of code prompts are too large to be held until here.
        firsts = (group[0] for group in _groups(_READERS[form](source, task), source))
        write_prompts(folder / PROMPTS, (trace.prompt for trace in firsts))
        _write_extras(folder / EXTRAS, (group[0] for group in _groups(_READERS[form](source, task), source)))
        return describe(folder, licence, None)


def _survey(traces: Iterator[Trace], source: Path) -> dict[str, bool]:
    """What the manifest says from its first shard on: whether anything is tokenised again, what all rows have."""
    retokenised = prompts = False
    logprobs = finish_reasons = empty = True
    for trace in traces:
        empty = False
        retokenised |= trace.completion_ids is None
        prompts |= trace.prompt_ids is None
        logprobs &= trace.logprobs is not None
        finish_reasons &= trace.finish_reason is not None
    if empty:
        raise RequestError(f"{source}: no rows in it")
    facts = {"retokenised": retokenised, "prompts_tokenised": prompts}
    return {**facts, "logprobs": logprobs, "finish_reasons": finish_reasons}


def _groups(traces: Iterator[Trace], source: Path) -> Iterator[list[Trace]]:
    """Traces of one prompt that follow each other. A prompt that a file lists twice becomes two, `ID` and `ID-2`."""
    seen: dict[str, list[Any]] = {}
    for (prompt_id, index), rows in groupby(traces, key=lambda t: (t.prompt.prompt_id, (t.extras or {}).get("index"))):
        places = seen.setdefault(prompt_id, [])
        if index in places:
            raise RequestError(
                f"{source}: rows of prompt {prompt_id} stand in two places; sort the file by prompt first"
            )
        places.append(index)
        group = list(rows)
        if len(places) > 1:
            other = replace(group[0].prompt, prompt_id=f"{prompt_id}-{len(places)}")
            group = [replace(trace, prompt=other) for trace in group]
        yield group


def _write_extras(path: Path, traces: Iterator[Trace]) -> None:
    rows = [{"prompt_id": trace.prompt.prompt_id, **trace.extras} for trace in traces if trace.extras is not None]
    if rows:
        path.parent.mkdir()
        pq.write_table(pa.Table.from_pylist(rows, schema=_EXTRAS), path, compression="zstd")


def _tokenizer_sha256(folder: Path | None) -> str:
    from pipeline.policies import snapshots

    return _UNKNOWN if folder is None else snapshots.tokenizer_sha256(folder)


def _encoder(folder: Path | None, source: Path) -> Any:
    """(encode text, encode chat) of a policy's tokenizer."""
    if folder is None:
        raise RequestError(f"{source}: has text without token ids; give --tokenizer DIR, the folder of the policy")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RequestError(
            f"{folder}: no tokenizer that can be read ({reason}); give the folder of the policy"
        ) from None

    def chat(prompt: Prompt) -> list[int]:
        text = tokenizer.apply_chat_template(prompt.chat(), add_generation_prompt=True, tokenize=False)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(completion: str) -> list[int]:
        return list(tokenizer(completion, add_special_tokens=False)["input_ids"])

    return text, chat


def _write_groups(folder: Path, groups: Iterator[list[Trace]], origin: Provenance, encode: Any) -> None:
    """Writes rollouts, and verdicts where the data came with rewards."""
    with (
        RolloutWriter(folder / ROLLOUTS, origin, samples=None) as writer,
        _Verdicts(folder / VERDICTS, origin) as verdicts,
    ):
        for group in groups:
            rollouts = [_rollout(trace, number, origin.snapshot_id, encode) for number, trace in enumerate(group)]
            writer.add_group(rollouts)
            for rollout, trace in zip(rollouts, group, strict=True):
                verdicts.add(rollout.rollout_id, trace.reward)
    (folder / ROLLOUTS / ".lock").unlink()


def _rollout(trace: Trace, sample: int, snapshot_id: str, encode: Any) -> Rollout:
    prompt_id = trace.prompt.prompt_id
    tokens = trace.completion_ids
    return Rollout(
        rollout_id=schema.rollout_id(snapshot_id, 0, prompt_id, sample, None),
        round=0,
        snapshot_id=snapshot_id,
        snapshot_step=0,
        prompt_id=prompt_id,
        sample=sample,
        prompt_tokens=encode[1](trace.prompt) if trace.prompt_ids is None else trace.prompt_ids,
        completion_tokens=encode[0](trace.completion) if tokens is None else tokens,
        # Log-probabilities belong to the tokens they were measured on, never to re-tokenised text.
        logprobs=None if tokens is None else trace.logprobs,
        completion=trace.completion,
        finish_reason=trace.finish_reason if trace.finish_reason in ("stop", "length", "abort") else "stop",
        seed=None,
    )


class _Verdicts:
    """Rewards that came with the data, as verdicts of a verifier named `imported`; no file where there are none."""

    def __init__(self, folder: Path, origin: Provenance) -> None:
        self._folder, self._version = folder, (origin.imported or {})["format"]
        self._rows: list[dict[str, Any]] = []
        self._writer: Any = None

    def add(self, rollout_id: str, reward: float | None) -> None:
        if reward is None:
            return
        row = {"rollout_id": rollout_id, "verifier": "imported", "verifier_version": self._version}
        status = "correct" if reward >= 1 else "wrong"
        row |= {"status": status, "reward": reward, "detail": "came with the data", "wall_ms": 0.0, "isolation": "none"}
        self._rows.append(row)
        if len(self._rows) >= 4096:
            self._flush()

    def _flush(self) -> None:
        if self._writer is None:
            self._folder.mkdir()
            metadata = {"oapl.schema_version": str(schema.SCHEMA_VERSION), "oapl.table": "verdicts"}
            path = self._folder / f"imported-{self._version}.parquet"
            self._writer = pq.ParquetWriter(path, schema.VERDICTS.with_metadata(metadata), compression="zstd")
        self._writer.write_table(pa.Table.from_pylist(self._rows, schema=schema.VERDICTS))
        self._rows = []

    def __enter__(self) -> _Verdicts:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._rows and kind is None:
            self._flush()
        if self._writer is not None:
            self._writer.close()


def _rows(source: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of a Parquet or JSON lines file, streaming."""
    if source.suffix == ".parquet":
        try:
            with pq.ParquetFile(source) as file:
                number = 0
                for batch in file.iter_batches(batch_size=256):
                    for row in batch.to_pylist():
                        yield f"{source}, row {number}", row
                        number += 1
        except (pa.ArrowException, OSError) as error:
            raise RequestError(f"{source}: not Parquet that can be read ({str(error).splitlines()[0]})") from None
        return
    with source.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise RequestError(f"{source}, line {number}: not JSON ({error.msg})") from None
                if not isinstance(row, dict):
                    raise RequestError(f"{source}, line {number}: expected an object with prompt and completion")
                yield f"{source}, line {number}", row


def _messages(value: Any, where: str, key: str) -> list[tuple[str, str]]:
    if isinstance(value, str):
        return [("user", value)]
    good = isinstance(value, list) and value and all(isinstance(message, dict) for message in value)
    if not good or not all(isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value):
        raise RequestError(f"{where}: {key!r} must be text or a list of messages with role and content")
    return [(message["role"], message["content"]) for message in value]


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if isinstance(value, list) and len(value) == 1:  # TRL's conversational form: one assistant message
        value = value[0].get("content") if isinstance(value[0], dict) else value[0]
    if not isinstance(value, str):
        raise RequestError(f"{where}: {key!r} must be text")
    return value


def _reward(value: Any, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(f"{where}: the reward must be a finite number, not {value!r}")
    return float(value)


def _numbers(value: Any, kind: type, where: str, key: str) -> Any:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(v, kind | int) and not isinstance(v, bool) for v in value):
        raise RequestError(f"{where}: {key!r} must be a list of {'numbers' if kind is float else 'token ids'}")
    return value


def _verl_prompt(row: dict[str, Any], where: str, task: str) -> tuple[Prompt, dict[str, Any]]:
    """A prompt of the columns that verl and the official repository share, and what else they say of it."""
    model = row.get("reward_model")
    truth = model.get("ground_truth") if isinstance(model, dict) else None
    if truth is None:
        raise RequestError(f"{where}: needs reward_model with ground_truth, by which responses are judged")
    truth = truth if isinstance(truth, str) else json.dumps(truth, ensure_ascii=False)
    messages = _messages(row.get("prompt"), where, "prompt")
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


def _read_official(source: Path, task: str) -> Iterator[Trace]:
    for where, row in _rows(source):
        prompt, extras = _verl_prompt(row, where, task)
        reward = _reward(row.get("precomputed_reward"), where)
        yield Trace(prompt, _text(row, "response", where), reward, extras=extras)


def _read_verl(source: Path, task: str) -> Iterator[Trace]:
    for where, row in _rows(source):
        prompt, extras = _verl_prompt(row, where, task)
        responses = row.get("responses")
        if not isinstance(responses, list) or not all(isinstance(text, str) for text in responses):
            raise RequestError(f"{where}: 'responses' must be a list of texts, as verl's generation writes it")
        rewards = row.get("rewards") or row.get("scores") or [None] * len(responses)
        if len(rewards) != len(responses):
            raise RequestError(f"{where}: {len(rewards)} rewards of {len(responses)} responses")
        for text, reward in zip(responses, rewards, strict=True):
            yield Trace(prompt, text, _reward(reward, where), extras=extras)


def _read_trl(source: Path, task: str) -> Iterator[Trace]:
    for where, row in _rows(source):
        tests = row.get("tests")
        prompt = make_prompt(
            str(row.get("task") or task),
            _messages(row.get("prompt", row.get("messages")), where, "prompt"),
            answer=None if row.get("answer") is None else str(row["answer"]),
            tests=tests if tests is None or isinstance(tests, str) else json.dumps(tests, ensure_ascii=False),
            source=str(row.get("source") or source.stem),
        )
        ids = _numbers(row.get("completion_ids"), int, where, "completion_ids")
        logprobs = _numbers(row.get("logprobs"), float, where, "logprobs")
        if logprobs is not None and (ids is None or len(ids) != len(logprobs)):
            raise RequestError(f"{where}: 'logprobs' must have one number a token of 'completion_ids'")
        yield Trace(
            prompt,
            _text(row, "completion", where),
            _reward(row.get("reward"), where),
            _numbers(row.get("prompt_ids"), int, where, "prompt_ids"),
            ids,
            logprobs,
            row.get("finish_reason"),
        )


_READERS = {"official": _read_official, "verl": _read_verl, "trl": _read_trl, "jsonl": _read_trl}


# --- out ----------------------------------------------------------------------------------------------------------

_CHAT = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_SHARED = [
    ("data_source", pa.string()),
    ("prompt", _CHAT),
    ("ability", pa.string()),
    ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
    ("extra_info", pa.struct([("split", pa.string()), ("index", pa.int64())])),
]
OFFICIAL = pa.schema(
    [
        *_SHARED,
        ("response", pa.string()),
        ("precomputed_reward", pa.float64()),
        ("response_rewards", pa.list_(pa.float64())),
    ]
)
"""Columns of the official repository's `verl/trainer/generate_offline_dataset.py` (danieldritter/OAPL)."""
VERL = pa.schema([*_SHARED, ("responses", pa.list_(pa.string())), ("rewards", pa.list_(pa.float64()))])
TRL = pa.schema(
    [
        ("prompt", _CHAT),
        ("completion", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float32())),
        ("reward", pa.float64()),
        ("finish_reason", pa.string()),
        ("task", pa.string()),
        ("answer", pa.string()),
        ("tests", pa.string()),
        ("source", pa.string()),
    ]
)


def export_foreign(place: Located, out: Path, form: str) -> int:
    """Writes one Parquet (or JSON lines) file in another project's columns; returns the rollouts written.

    Without a reward a rollout can't be told in the official and verl columns: its group goes out with null there.
    """
    if place.prompts is None:
        raise RequestError(f"{place.root}: no prompts beside the rollouts; they are a part of this format")
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise RequestError(f"{out}: is there already; choose another name")
    rows = 0
    with durable.told_in_one_line(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.is_dir():
            out.rmdir()
        with durable.replacing(out) as temporary, _Sink(temporary, form) as sink, PromptShelf(place.prompts) as prompts:
            for prompt, rollouts in _samples(place, prompts):
                sink.write(_WRITERS[form](prompt, rollouts))
                rows += len(rollouts)
    return rows


def _samples(place: Located, shelf: PromptShelf) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Groups: the prompt's row, with what its file of origin said under `extras`, and rollouts with their reward."""
    verdicts = VerdictIndex(place.verdicts)
    kept = place.root / EXTRAS
    extras = {row["prompt_id"]: row for row in pq.read_table(kept).to_pylist()} if kept.is_file() else {}
    index = 0
    for batch in iter_batches(place.rollouts):
        for group in split_groups(batch):
            rows = group.to_pylist()
            _, rewards = verdicts.lookup(row["rollout_id"] for row in rows)
            for row, reward in zip(rows, rewards.tolist(), strict=True):
                row["reward"] = None if math.isnan(reward) else reward
            prompt = shelf.find(rows[0]["prompt_id"])
            if prompt is None:
                name = rows[0]["prompt_id"]
                raise RequestError(f"{place.root}: prompt {name} is missing; run `oapl rollouts validate`")
            split = "test" if prompt["split"] == "heldout" else "train"
            plain = {"ability": prompt["task"], "style": "rule", "split": split, "index": index}
            prompt["extras"] = extras.get(prompt["prompt_id"], plain)
            yield prompt, rows
            index += 1


class _Sink:
    def __init__(self, path: Path, form: str) -> None:
        self._schema = {"official": OFFICIAL, "verl": VERL}.get(form, TRL)
        self._lines = path.open("w", encoding="utf-8") if form == "jsonl" else None
        self._writer = None if self._lines else pq.ParquetWriter(path, self._schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []

    def write(self, rows: list[dict[str, Any]]) -> None:
        self._rows += rows
        if len(self._rows) >= 1024:
            self._flush()

    def _flush(self) -> None:
        if self._lines is not None:
            self._lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in self._rows)
        elif self._writer is not None:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
        self._rows = []

    def __enter__(self) -> _Sink:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._flush()
        for sink in (self._lines, self._writer):
            if sink is not None:
                sink.close()


def _shared_columns(prompt: dict[str, Any]) -> dict[str, Any]:
    truth, extras = prompt["tests"] if prompt["answer"] is None else prompt["answer"], prompt["extras"]
    return {
        "data_source": prompt["source"],
        "prompt": prompt["messages"],
        "ability": extras["ability"],
        "reward_model": {"style": extras["style"], "ground_truth": truth},
        "extra_info": {"split": extras["split"], "index": extras["index"]},
    }


def _official_rows(prompt: dict[str, Any], rollouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    shared, rewards = _shared_columns(prompt), [row["reward"] for row in rollouts]
    return [
        {**shared, "response": row["completion"], "precomputed_reward": row["reward"], "response_rewards": rewards}
        for row in rollouts
    ]


def _verl_rows(prompt: dict[str, Any], rollouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    texts, rewards = [row["completion"] for row in rollouts], [row["reward"] for row in rollouts]
    return [{**_shared_columns(prompt), "responses": texts, "rewards": rewards}]


def _trl_rows(prompt: dict[str, Any], rollouts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": prompt["messages"],
            "completion": row["completion"],
            "prompt_ids": row["prompt_tokens"],
            "completion_ids": row["completion_tokens"],
            "logprobs": row["logprobs"],
            "reward": row["reward"],
            "finish_reason": row["finish_reason"],
            **{key: prompt[key] for key in ("task", "answer", "tests", "source")},
        }
        for row in rollouts
    ]


_WRITERS = {"official": _official_rows, "verl": _verl_rows, "trl": _trl_rows, "jsonl": _trl_rows}
