"""Another project's file as a dataset of ours."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import RequestError
from pipeline.policies.snapshots import tokenizer_sha256
from pipeline.prompts.files import Prompt, write_prompts
from pipeline.rollouts import schema
from pipeline.rollouts.locate import EXTRAS, PROMPTS, ROLLOUTS, VERDICTS
from pipeline.rollouts.schema import Rollout
from pipeline.rollouts.store import Provenance, RolloutWriter
from pipeline.sharing.exchange.form import Trace
from pipeline.sharing.exchange.forms import FORMS
from pipeline.sharing.package import describe, new_folder
from pipeline.storage import durable

_UNKNOWN = "unknown"


_EXTRAS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("ability", pa.string()),
        ("style", pa.string()),
        ("split", pa.string()),
        ("index", pa.int64()),
    ]
)


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
    facts = _survey(FORMS[form].read(source, task), source)
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
        _write_groups(folder, _groups(FORMS[form].read(source, task), source), origin, encode)
        # The source is read once more for its prompts: tests of code prompts are too large to be held until here.
        firsts = (group[0] for group in _groups(FORMS[form].read(source, task), source))
        write_prompts(folder / PROMPTS, (trace.prompt for trace in firsts))
        _write_extras(folder / EXTRAS, (group[0] for group in _groups(FORMS[form].read(source, task), source)))
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
    return _UNKNOWN if folder is None else tokenizer_sha256(folder)


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
